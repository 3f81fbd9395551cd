-- End pairs with the levels that the model returned, whichever claim holds them now: a late answer is an
-- answer.
--
-- ARGV[1]  id of the claim
-- ARGV[2]  17 bytes a pair: digest, level
-- ARGV[3]  msgpack list of {digest, error} of the pairs that the model answered with an invalid level
-- ARGV[4]  milliseconds for which an invalid answer is remembered when it comes twice; doubled each further
--          time
-- ARGV[5]  1 if the model answered, 0 if the levels were found in the cache
-- ARGV[6]  replica
-- Reply    OK
--
-- Tombstones (see cache/lua/add_tombstones.lua) have the time at which pairs were invalidated, the log of
-- invalidations (see cache/invalidation.py) which pairs the replicas remove from their memory.
local id = ARGV[1]
local levels = ARGV[2]
local errors = cmsgpack.unpack(ARGV[3])
publish(levels, errors)

-- End the records of all these pairs. `answers` is digest and level in turn.
local digests, answers = {}, {}
for at = 1, #levels, DIGEST_BYTES + 1 do
  local digest = string.sub(levels, at, at + DIGEST_BYTES - 1)
  digests[#digests + 1] = digest
  answers[#answers + 1] = digest
  answers[#answers + 1] = string.byte(levels, at + DIGEST_BYTES)
end
for _, item in ipairs(errors) do
  digests[#digests + 1] = item[1]
end
load_pairs(digests)
for _, digest in ipairs(digests) do
  if records[digest] then
    remove_pair(digest)
  end
end
if ARGV[5] == '1' then
  model.record_answer(ARGV[6])
end

-- Answers arrive in parts. The claim ends with the last of its pairs.
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
  delete_claim(id)
  -- The probe of one half passed, so the bad pair is in the other half.
  if claim.rest then
    add_suspect_group(claim.rest)
    publish('', {})
  end
end
write_changes()

-- Pairs that were invalidated after they were claimed: the callers that wait are answered, but the answer is
-- not remembered. If the claim is over, the time of the claim is unknown, and any tombstone counts.
local TOMBSTONES = INVALIDATIONS .. 'tombs'
local claimed_at = claim and claim.at or 0
if redis.call('TYPE', TOMBSTONES).ok == 'zset' then
  -- A time that is further in the future than a tombstone is kept is garbage.
  local KEPT_MS = 86400000
  local function invalidated_at(member)
    local found = to_number(redis.call('ZSCORE', TOMBSTONES, member)) or -1
    return found <= now + KEPT_MS and found or -1
  end
  local all_invalidated_at = invalidated_at('*')
  local kept, entries = {}, {}
  for at = 1, #answers, 2 do
    if math.max(all_invalidated_at, invalidated_at(answers[at])) < claimed_at then
      kept[#kept + 1] = answers[at]
      kept[#kept + 1] = answers[at + 1]
    else
      local token = string.sub(redis.sha1hex(id .. answers[at] .. clock[1] .. clock[2]), 1, 8)
      entries[#entries + 1] = token .. answers[at]
    end
  end
  answers = kept

  -- A replica whose waiting request came after the invalidation puts the answer into its memory, so all
  -- replicas have to remove it once more. The claimer would write these entries when it has stored the
  -- answer, but it may be killed before.
  local LOG = INVALIDATIONS .. 'log'
  local MAX_LOG_ENTRIES = 10000
  local kind = redis.call('TYPE', LOG).ok
  if #entries > 0 and (kind == 'list' or kind == 'none') then
    in_chunks('RPUSH', LOG, entries)
    redis.call('LTRIM', LOG, -MAX_LOG_ENTRIES, -1)
  end
end
remember('recent', RECENT_MS, answers)

-- An invalid answer may be an accident, so the pair is sent again for the next request. When it comes again,
-- requests get the error for a while. The same answer may be reported twice: then it counts once.
local invalid = {}
for _, item in ipairs(errors) do
  local times = 1
  for ago = 0, 1 do
    local seen = unpack_safely(redis.call('HGET', outcome_key('nonsense', RECENT_MS, ago), item[1]))
    local again = seen and seen[4] == id and 0 or 1
    times = math.max(times, seen and (to_number(seen[1]) or 0) + again or 1)
  end
  local kept_ms = times > 1 and math.min(RECENT_MS, tonumber(ARGV[4]) * 2 ^ (times - 2)) or 0
  invalid[#invalid + 1] = item[1]
  invalid[#invalid + 1] = cmsgpack.pack({ times, now + kept_ms, item[2], id })
end
remember('nonsense', RECENT_MS, invalid)
return redis.status_reply('OK')
