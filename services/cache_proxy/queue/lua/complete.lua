-- End pairs with their levels, whoever holds them: a late answer is an answer.
-- ARGV[1]  the claim's id   ARGV[2]  17 bytes a pair: digest, level   ARGV[3]  msgpack list of {digest, error},
--          of pairs that the model answered with nonsense
-- ARGV[4]  ms for which nonsense is remembered when it comes twice; twice as long each time it comes again
-- ARGV[5]  1 if the model answered, 0 if the answers were found elsewhere   ARGV[6]  replica
-- INVALIDATIONS .. 'log' is the log of invalidations: see store/invalidation.py. The tombstones of what was invalidated
-- are `cache-proxy invalidate`'s (cache/lua/add_tombstones.lua): digest, or `*`, and when.
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
if ARGV[5] == '1' then
  model.answered(ARGV[6])
end
local claim = load_claim(id)
local function has_ended()
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
if claim and has_ended() then
  end_claim(id)
  if claim.rest then -- the probe passed: the bad pair is among the rest
    suspects(claim.rest)
    publish('', {})
  end
end
write()
-- Invalidated since they were claimed: whoever waits is answered, and nobody who comes later. If the claim is long
-- over, nobody knows when that was.
local TOMBS, since = INVALIDATIONS .. 'tombs', claim and claim.at or 0
if redis.call('TYPE', TOMBS).ok == 'zset' then
  local KEPT_MS = 86400000 -- see add_tombstones.lua: what is further in the future than that is garbage
  local function buried_at(member)
    local found = number(redis.call('ZSCORE', TOMBS, member)) or -1
    return found <= now + KEPT_MS and found or -1
  end
  local all = buried_at('*')
  local kept, buried = {}, {}
  for at = 1, #answers, 2 do
    if math.max(all, buried_at(answers[at])) < since then
      kept[#kept + 1], kept[#kept + 2] = answers[at], answers[at + 1]
    else
      local token = string.sub(redis.sha1hex(id .. answers[at] .. clock[1] .. clock[2]), 1, 8)
      buried[#buried + 1] = token .. answers[at]
    end
  end
  answers = kept
  -- A replica whose waiting request came after the invalidation puts the answer into its memory, so all are to forget it
  -- again. The claimer would see to that once it has stored the answer, but it may die before.
  local LOG, KEPT_ENTRIES = INVALIDATIONS .. 'log', 10000
  local kind = redis.call('TYPE', LOG).ok
  if #buried > 0 and (kind == 'list' or kind == 'none') then
    in_chunks('RPUSH', LOG, buried)
    redis.call('LTRIM', LOG, -KEPT_ENTRIES, -1)
  end
end
remember('recent', RECENT_MS, answers)
-- Nonsense may have been a whim of the model's, so whoever comes back at once is asked for again; but not for ever.
local nonsense = {}
for _, item in ipairs(errors) do
  local times = 1
  for ago = 0, 1 do
    local seen = unpack_safely(redis.call('HGET', recent_key('nonsense', RECENT_MS, ago), item[1]))
    local again = seen and seen[4] == id and 0 or 1 -- the same answer may be told twice
    times = math.max(times, seen and (number(seen[1]) or 0) + again or 1)
  end
  local kept_ms = times > 1 and math.min(RECENT_MS, tonumber(ARGV[4]) * 2 ^ (times - 2)) or 0
  nonsense[#nonsense + 1] = item[1]
  nonsense[#nonsense + 1] = cmsgpack.pack({ times, now + kept_ms, item[2], id })
end
remember('nonsense', RECENT_MS, nonsense)
return redis.status_reply('OK')
