-- End pairs with their levels, whoever holds them: a late answer is an answer.
-- ARGV[1]  the claim's id   ARGV[2]  17 bytes a pair: digest, level   ARGV[3]  msgpack list of {digest, error},
--          of pairs that the model answered with nonsense
local id, levels, errors = ARGV[1], ARGV[2], cmsgpack.unpack(ARGV[3])
publish(levels, errors)
local digests, answers = {}, {}
for at = 1, #levels, DIGEST + 1 do
  local digest = string.sub(levels, at, at + DIGEST - 1)
  digests[#digests + 1] = digest
  answers[#answers + 1] = digest
  answers[#answers + 1] = string.byte(levels, at + DIGEST)
end
for _, item in ipairs(errors) do
  digests[#digests + 1] = item[1]
end
load_pairs(digests)
for _, digest in ipairs(digests) do
  if records[digest] then
    forget(digest)
  end
end
redis.call('HDEL', LIMIT, 'failures')
local claim = load_claim(id)
local function is_over()
  for at, digest in ipairs(claim.digests) do
    if records[digest] == nil then
      load_pairs({ unpack(claim.digests, at, math.min(at + 50, #claim.digests)) })
    end
    if records[digest] and records[digest].claim == id then
      return false
    end
  end
  return true
end
if claim and is_over() then
  end_claim(id)
  if claim.rest then -- the probe passed: the bad pair is among the rest
    suspects(claim.rest)
    publish('', {})
  end
end
write()
remember('recent', RECENT_MS, answers)
return redis.status_reply('OK')
