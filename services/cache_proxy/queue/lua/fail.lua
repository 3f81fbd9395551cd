-- A call to the model failed. Its pairs wait again, or end with the error if the model has answered nothing
-- for the retry window.
--
-- ARGV[1]   id of the claim
-- ARGV[2]   milliseconds for which the model requested no calls (a pushback), -1 if it did not
-- ARGV[3]   the error, packed: {'unavailable', message, seconds, ...}
-- ARGV[4]   the retry window, ms
-- ARGV[5]   the first backoff, ms
-- ARGV[6]   the longest backoff, ms
-- ARGV[7]   the longest backoff after a breakdown, ms
-- ARGV[8]   1 if the model broke down in the call, perhaps because of one of its pairs. If all of them were
--           in such a call before, the pair is searched for, as in a rejected batch
-- ARGV[9]   1 if the model never received the call: its slot is free again
-- ARGV[10]  failed batches that a pair may have been in, with others answered in between, before it is
--           searched for
-- ARGV[11]  breakdowns in a row that the search for a pair may take
-- ARGV[12]  rejected batches that a pair may have been in before it is taken for the bad one (see reject.lua)
-- Reply     OK
local id = ARGV[1]
local pushback_ms = tonumber(ARGV[2])
local error = unpack_safely(ARGV[3])
local window_ms = tonumber(ARGV[4])
local is_breakdown = ARGV[8] == '1'
local max_breakdowns = tonumber(ARGV[11])
-- A call may be claimed a little before its slot.
local SLACK_MS = 20
local claim = load_claim(id)
if not claim then
  return redis.status_reply('OK')
end
if ARGV[9] == '1' then
  model.free_slot(id)
end

-- Count the failures of the target in a row. Calls that were under way at the same time fail as one.
local failures, not_before = model.backoff()
local failed_at = to_number(redis.call('HGET', MODEL, 'failed_at')) or 0
if model.outage_is_over(failed_at, not_before, window_ms) then
  failures = 0
end
if failures == 0 or claim.at >= failed_at or failed_at > now then
  failures = failures + 1
  failed_at = now
end

-- The outage of the namespace: the answer of any replica ends it, whichever target it calls.
local outage = redis.call('HMGET', META, 'failing_since', 'failing_at')
local since = to_number(outage[1])
if not since or since > now or model.outage_is_over(to_number(outage[2]) or 0, not_before, window_ms) then
  since = now
end

-- When the next call is allowed: after the pushback, or a backoff that doubles. The last attempt is at the
-- end of the retry window. After a breakdown or a pushback, batches stay whole (see outage.py).
local wait_ms = pushback_ms
local field = 'pushback_until'
if pushback_ms < 0 then
  local longest_ms = tonumber(is_breakdown and ARGV[7] or ARGV[6])
  wait_ms = math.min(longest_ms, tonumber(ARGV[5]) * 2 ^ math.min(failures - 1, 20))
  field = 'backoff_until'
  if now < since + window_ms - SLACK_MS and not is_breakdown then
    wait_ms = math.min(wait_ms, since + window_ms - now)
  end
end
not_before = math.max(not_before, now + math.ceil(wait_ms))
redis.call('HSET', MODEL, 'failures', failures, 'failed_at', failed_at, field, not_before,
  'breaking', (is_breakdown or pushback_ms >= 0) and 1 or 0)
redis.call('PEXPIRE', MODEL, model.KEPT_MS)
local is_down = now - since >= window_ms - SLACK_MS and (not is_breakdown or failures >= max_breakdowns)
error[3] = math.max(1, (not_before - now) / 1000)
redis.call('HSET', META, 'failing_since', since, 'failing_at', now, 'down', is_down and 1 or 0,
  'reason', cmsgpack.pack(redact(error)))

-- One of the pairs may be the cause if all of them were in batches that failed before. For a single pair that
-- is only likely if other batches were answered in between.
local is_first_failure = failures == 1
local held, all_failed_before = 0, true
load_pairs(claim.digests)
for _, digest in ipairs(claim.digests) do
  if records[digest] and records[digest].claim == id then
    held = held + 1
    local max_attempts = is_breakdown and 1 or tonumber(ARGV[10])
    all_failed_before = all_failed_before and records[digest].attempts >= max_attempts
  end
end
if not is_down and all_failed_before and (held > 1 or held == 1 and is_first_failure) then
  end_or_suspect(id, claim, error, {}, tonumber(ARGV[12]), 'broke', RECENT_MS)
  return redis.status_reply('OK')
end

-- A probe of one pair broke the model down: the other half is probed before it. If that passes, the model
-- works.
if is_breakdown and held == 1 and claim.rest then
  add_suspect_group(claim.rest)
  claim.rest = {}
end
return_pairs(id, claim, function(_, pair)
  pair.attempts = pair.attempts + ((is_breakdown or is_first_failure) and 1 or 0)
  return true
end)
write_changes()
if not is_down then
  publish('', {}, nil, { not_before - now, error, MODEL })
  return redis.status_reply('OK')
end

-- The model is down: end all pairs that wait, since their callers would wait in vain. Pairs in other claims
-- stay, for their calls may still be answered.
local claim_ids, kept = redis.call('HKEYS', CLAIMS), {}
for _, other_id in ipairs(claim_ids) do
  local other = load_claim(other_id) or { digests = {} }
  load_pairs(other.digests)
  for _, digest in ipairs(other.digests) do
    if records[digest] and records[digest].claim == other_id then
      kept[#kept + 1] = digest
      bytes_delta = bytes_delta + records[digest].size
      mark_changed(digest)
    end
  end
end
for _, priority in ipairs(PRIORITIES) do
  for _, lane in ipairs(lanes_of(priority)) do
    redis.call('UNLINK', lane_key(lane), fair_key(lane), fair_key(account_flows(priority)))
    redis.call('HDEL', META, 'virtual:' .. lane)
  end
end
redis.call('UNLINK', PAIRS, SUSPECT_GROUPS, QUOTAS)
redis.call('HDEL', META, 'bytes')
write_changes()
publish('', {}, error)
return redis.status_reply('OK')
