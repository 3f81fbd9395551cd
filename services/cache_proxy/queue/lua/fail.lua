-- The call failed: its pairs are tried again, or end with the error if the model answered nothing for the retry window.
-- ARGV[1]  the claim's id   ARGV[2]  ms that the model asked to be left alone, -1 if it did not
-- ARGV[3]  the error, packed: {'unavailable', message, seconds, ...}   ARGV[4]  the retry window, ms
-- ARGV[5]  the first backoff, ms, [6] the longest, [7] the longest after a breakdown
-- ARGV[8]  1 if the model broke down in it, perhaps over one of its pairs: one that was in another such call
--          before is then looked for, as in a batch that was refused
-- ARGV[9]  1 if the model never got the call: its slot is free again
-- ARGV[10] failed batches that a pair may have been in, with others answered in between, before it is looked for
-- ARGV[11] breakdowns in a row that the search for a pair may take   ARGV[12]  see reject.lua, ARGV[4]
local id, pushback, error, window = ARGV[1], tonumber(ARGV[2]), unpack_safely(ARGV[3]), tonumber(ARGV[4])
local SLACK_MS = 20 -- a call may be claimed a little before it is due
local suspicious, most_breakdowns = ARGV[8] == '1', tonumber(ARGV[11])
local claim = load_claim(id)
if not claim then
  return redis.status_reply('OK')
end
if ARGV[9] == '1' then
  model.free_slot(id)
end

-- The target's failures: what is under way together fails as one.
local failures, not_before = model.backoff()
local failed_at = number(redis.call('HGET', MODEL, 'failed_at')) or 0
if model.is_over(failed_at, not_before, window) then
  failures = 0
end
if failures == 0 or claim.at >= failed_at or failed_at > now then
  failures, failed_at = failures + 1, now
end
-- The namespace's: any replica's answer ends them, whatever target it calls.
local outage = redis.call('HMGET', META, 'failing_since', 'failing_at')
local since = number(outage[1])
if not since or since > now or model.is_over(number(outage[2]) or 0, not_before, window) then
  since = now
end
local wait, field = pushback, 'pushback_until'
if pushback < 0 then
  local longest = tonumber(suspicious and ARGV[7] or ARGV[6])
  wait, field = math.min(longest, tonumber(ARGV[5]) * 2 ^ math.min(failures - 1, 20)), 'backoff_until'
  if now < since + window - SLACK_MS and not suspicious then -- the last try is when the window ends
    wait = math.min(wait, since + window - now)
  end
end
not_before = math.max(not_before, now + math.ceil(wait))
redis.call('HSET', MODEL, 'failures', failures, 'failed_at', failed_at, field, not_before,
  'breaking', (suspicious or pushback >= 0) and 1 or 0) -- then batches stay whole: see outage.py
redis.call('PEXPIRE', MODEL, model.KEPT_MS)
local is_down = now - since >= window - SLACK_MS and (not suspicious or failures >= most_breakdowns)
error[3] = math.max(1, (not_before - now) / 1000)
redis.call('HSET', META, 'failing_since', since, 'failing_at', now, 'down', is_down and 1 or 0,
  'reason', cmsgpack.pack(told_to_anyone(error)))

-- One of its pairs may be why: all were in batches that failed before. Of a lone pair that says nothing unless others
-- passed meanwhile.
local is_telling, held, is_worn = failures == 1, 0, true
load_pairs(claim.digests)
for _, digest in ipairs(claim.digests) do
  if records[digest] and records[digest].claim == id then
    held = held + 1
    is_worn = is_worn and records[digest].attempts >= (suspicious and 1 or tonumber(ARGV[10]))
  end
end
if not is_down and is_worn and (held > 1 or held == 1 and is_telling) then
  convict(id, claim, error, {}, tonumber(ARGV[12]), 'broke', RECENT_MS)
  return redis.status_reply('OK')
end
if suspicious and held == 1 and claim.rest then -- the rest is probed before it: if that passes, the model is well
  suspects(claim.rest)
  claim.rest = {}
end
give_back(id, claim, function(_, pair)
  pair.attempts = pair.attempts + ((suspicious or is_telling) and 1 or 0)
  return true
end)
write()
if not is_down then
  publish('', {}, nil, { not_before - now, error, MODEL })
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
