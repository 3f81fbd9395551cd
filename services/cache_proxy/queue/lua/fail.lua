-- The call failed: its pairs are tried again, or end with the error if that was often.
-- ARGV[1]  the claim's id   ARGV[2]  ms before the next call to the model by anybody   ARGV[3]  the error, packed
-- ARGV[4]  failed calls that a pair may see   ARGV[5]  in a row, before the model is taken for down
-- ARGV[6]  1 if the model broke down in it, perhaps over one of its pairs: one that was in another such call
--          before is then looked for, as in a batch that was refused   ARGV[7]  see refuse.lua, ARGV[4]
local id, error, most, most_in_a_row = ARGV[1], unpack_safely(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local claim = load_claim(id)
if not claim then
  return redis.status_reply('OK')
end
redis.call('HSET', LIMIT, 'not_before',
  math.max(number(redis.call('HGET', LIMIT, 'not_before')) or 0, now + tonumber(ARGV[2])))
local failures = number(redis.call('HGET', LIMIT, 'failures')) or 0
if claim.at >= (number(redis.call('HGET', LIMIT, 'failed_at')) or 0) then -- what is under way together fails as one
  failures = failures + 1
  redis.call('HSET', LIMIT, 'failures', failures, 'failed_at', now)
end
-- One of its pairs may be why: all failed before. Of a lone pair that says nothing unless others passed meanwhile.
local function is_suspect()
  local held = 0
  load_pairs(claim.digests)
  for _, digest in ipairs(claim.digests) do
    if records[digest] and records[digest].claim == id then
      held = held + 1
      if records[digest].attempts == 0 then
        return false
      end
    end
  end
  return held > 1 or failures == 1
end
if ARGV[6] == '1' and failures < most_in_a_row and is_suspect() then
  convict(id, claim, error, {}, tonumber(ARGV[7]), 'broke', RECENT_MS)
  return redis.status_reply('OK')
end
local ended = {}
give_back(id, claim, function(digest, pair)
  pair.attempts = pair.attempts + 1
  if pair.attempts < most then
    return true
  end
  forget(digest)
  ended[#ended + 1] = { digest, error }
  return false
end)
write()
if failures < most_in_a_row then
  publish('', ended)
  return redis.status_reply('OK')
end

-- The model is down, and whoever waits would wait for nothing. What is in flight may yet be answered.
local flying, kept = redis.call('HKEYS', CLAIMS), {}
for _, other in ipairs(flying) do
  local flight = load_claim(other) or { digests = {} }
  load_pairs(flight.digests)
  for _, digest in ipairs(flight.digests) do
    if records[digest] and records[digest].claim == other then
      kept[#kept + 1] = digest
      bytes = bytes + records[digest].size
      save(digest)
    end
  end
end
for _, priority in ipairs(LANES) do
  for _, lane in ipairs(lanes_of(priority)) do
    redis.call('UNLINK', lane_key(lane), fair_key(lane), fair_key(turns_of(priority)))
    redis.call('HDEL', META, 'virtual:' .. lane)
  end
end
redis.call('UNLINK', PAIRS, GROUPS, QUOTAS)
redis.call('HDEL', META, 'bytes')
write()
publish('', {}, error)
return redis.status_reply('OK')
