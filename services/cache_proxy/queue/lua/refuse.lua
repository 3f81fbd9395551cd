-- The model refused the batch for a pair.
-- ARGV[1]  the claim's id   ARGV[2]  the error, packed   ARGV[3]  msgpack list of {digest, error} of the pairs that
--          it named; if it named none, one of them is bad, and they are suspects
-- ARGV[4]  refused batches that a pair may have been in before it is taken for the bad one
local id, error, named, most = ARGV[1], unpack_safely(ARGV[2]), cmsgpack.unpack(ARGV[3]), tonumber(ARGV[4])
local claim = load_claim(id)
if not claim then
  return redis.status_reply('OK')
end
end_claim(id)
redis.call('HDEL', LIMIT, 'failures')
local reasons, held, ended, refusals, suspected = {}, {}, {}, {}, {}
for _, item in ipairs(named) do
  reasons[item[1]] = item[2]
end
load_pairs(claim.digests)
for _, digest in ipairs(claim.digests) do
  if records[digest] and records[digest].claim == id then
    held[#held + 1] = digest
  end
end
for _, digest in ipairs(held) do
  local pair = records[digest]
  pair.refusals = pair.refusals + 1
  local reason = reasons[digest]
  if not reason and #named == 0 and (#held == 1 or pair.refusals >= most) then
    reason = error
  end
  if reason then
    forget(digest)
    refusals[#refusals + 1] = digest
    refusals[#refusals + 1] = cmsgpack.pack(reason)
    ended[#ended + 1] = { digest, reason }
  elseif not anybody_waits(pair) then
    forget(digest)
  elseif #named > 0 then
    wait_in_front(digest)
  else
    pair.claim, pair.suspect = nil, true
    save(digest)
    suspected[#suspected + 1] = digest
  end
end
load_pairs(claim.rest or {})
for _, digest in ipairs(claim.rest or {}) do -- the bad one was in the half that was probed
  if records[digest] and records[digest].suspect then
    wait_in_front(digest)
  end
end
suspects(suspected)
write()
remember('refused', REFUSED_MS, refusals)
publish('', ended)
return redis.status_reply('OK')
