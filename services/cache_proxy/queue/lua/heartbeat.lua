-- Record that a replica runs, and that it really holds these claims; return what it needs to know of the
-- queue.
--
-- ARGV[1]   replica
-- ARGV[2]   msgpack list of the ids of the claims that it holds
-- ARGV[3]   host:port of its HTTP endpoint
-- ARGV[4]   1 after it was without Redis: it may just have called the model in a time slot of its own
-- ARGV[5]   pairs per second, [6] calls per second, [7] pairs in a batch: used if Redis has none, or garbage
-- ARGV[8]   msgpack list of the keys of the logs of invalidations that it follows
-- ARGV[9]   run id of the server that its last heartbeat reached, empty for the first one. If it was another
--           server, the replica may just have called the model too
-- ARGV[10]  msgpack list of {minute, report} for the status page
-- Reply     msgpack list:
--            1  now, ms                          2  messages published so far
--            3  id of the queue                  4  {interactive, bulk, refresh}: pairs that wait
--            5  ms since the oldest pair came for which a caller waits
--            6  members, separated by commas: the order of the time slots without Redis
--            7  {replica, address} of each that is late with its heartbeat, to be probed
--            8  ms between time slots            9  subscribers that this server has for the replica
--           10  the last entry of each log, false if it has none
--           11  run id of this server           12  pairs that wait only because a quota is used up
--           13  names of the values that were garbage and were replaced
local replica = ARGV[1]
local FORGOTTEN_MS, LATE_HEARTBEAT_MS, MAX_NAME_BYTES = 600000, 500, 64
local held = {}
for _, id in ipairs(cmsgpack.unpack(ARGV[2])) do
  held[id] = true
end
local garbage = {}
local function is_garbage(name, value, is_valid)
  garbage[#garbage + 1] = value and not is_valid and name or nil
  return value and not is_valid
end

-- Replace limits that cannot be read by those of this replica.
for at, setting in ipairs({ 'pairs_per_second', 'calls_per_second', 'batch_pairs' }) do
  local value = redis.call('HGET', LIMIT, setting)
  local is_valid = to_rate(value)
  if setting == 'batch_pairs' then
    is_valid = deployment_batch_pairs(false)
  end
  if not value or is_garbage(setting, value, is_valid) then
    redis.call('HSET', LIMIT, setting, ARGV[at + 4])
  end
end

-- Delete times that are impossible. Without its arrival time a limit counts as fully used (see claim.lua).
for _, time in ipairs({ 'pairs_tat', 'calls_tat', 'not_before', 'quotas_since' }) do
  local value = redis.call('HGET', LIMIT, time)
  local at = to_number(value)
  if is_garbage(time, value, at and at <= now + slot_ms() + HOUR_MS) then
    redis.call('HDEL', LIMIT, time)
  end
end

-- The replica is a member that uses the shared queue, so the fleet has its format.
if redis.call('HGET', LIMIT, 'format') ~= tostring(FORMAT) then
  redis.call('HSET', LIMIT, 'format', FORMAT)
end
redis.call('HDEL', STANDBY, replica)
redis.call('ZADD', REPLICAS, now, replica)
redis.call('HSET', ADDRESSES, replica, ARGV[3])
redis.call('HDEL', PAUSED, replica)
redis.call('HDEL', ALONE, replica)
reap(replica, held)

-- Remove members that have been silent for long, and garbage.
local known = redis.call('ZRANGE', REPLICAS, 0, -1, 'WITHSCORES')
for at = 1, #known, 2 do
  local name = known[at]
  local heartbeat_at = to_number(known[at + 1])
  local is_valid = #name <= MAX_NAME_BYTES and string.find(name, '^%x+$')
    and heartbeat_at and heartbeat_at <= now + FORGOTTEN_MS
  if is_garbage('replicas', name, is_valid) or heartbeat_at <= now - FORGOTTEN_MS then
    redis.call('ZREM', REPLICAS, name)
    redis.call('HDEL', ADDRESSES, name)
    redis.call('HDEL', PAUSED, name)
    redis.call('HDEL', ALONE, name)
  end
end

-- The replica may just have called the model without this server: the limit counts as used by one batch, and
-- what a claim consumed before is not returned.
local run_id = server_run_id()
if ARGV[4] == '1' or (ARGV[9] ~= '' and ARGV[9] ~= run_id) then
  redis.call('HSET', LIMIT,
    'calls_tat', math.max(to_number(redis.call('HGET', LIMIT, 'calls_tat')) or 0, now + slot_ms()),
    'pairs_tat', math.max(to_number(redis.call('HGET', LIMIT, 'pairs_tat')) or 0, now + slot_ms()))
  redis.call('HDEL', LIMIT, 'last')
  assume_quotas_spent()
end

-- Count what waits. Refreshed pairs have no caller that waits for them, so they do not count for the oldest.
local waiting, oldest_at, held_back = {}, now, 0
local has_pairs = redis.call('EXISTS', PAIRS) == 1
for at, priority in ipairs(PRIORITIES) do
  waiting[at] = 0
  for _, lane in ipairs(has_pairs and lanes_of(priority) or {}) do
    local count = redis.call('ZCARD', lane_key(lane))
    local account = account_of(lane)
    waiting[at] = waiting[at] + count
    if count > 0 and priority ~= 'refresh' then
      local first = redis.call('ZRANGE', lane_key(lane), 0, 0)
      load_pairs(first)
      if records[first[1]] then
        oldest_at = math.min(oldest_at, records[first[1]].at)
      end
      if account and sendable_pairs(account, rates[account], now) == 0 then
        held_back = held_back + count
      end
    end
  end
end

-- While a member is silent, the list stays as that member knows it: both sides must agree on the time slots.
-- A replica that came since has none.
local late = redis.call('ZRANGEBYSCORE', REPLICAS, '-inf', '(' .. (now - LATE_HEARTBEAT_MS))
for at, name in ipairs(late) do
  late[at] = { name, redis.call('HGET', ADDRESSES, name) or '' }
end
if #late == 0 then
  local all = redis.call('ZRANGE', REPLICAS, 0, -1)
  table.sort(all)
  redis.call('HSET', LIMIT, 'members', table.concat(all, ','))
end
local logs = last_log_entries(cmsgpack.unpack(ARGV[8]))

-- A report replaces the one that the replica sent for the same minute, so a repeated report counts once.
local REPORT_MINUTES, MAX_REPORTS = 12, 256
for _, report in ipairs(unpack_safely(ARGV[10]) or {}) do
  local minute = report[1]
  local key = report_key(minute)
  if redis.call('TYPE', key).ok ~= 'hash' then
    redis.call('DEL', key)
  end
  if math.abs(minute - now / 60000) < REPORT_MINUTES
    and (redis.call('HLEN', key) < MAX_REPORTS or redis.call('HEXISTS', key, replica) == 1)
    and redis.call('HSET', key, replica, report[2]) == 1 then
    redis.call('PEXPIRE', key, REPORT_MINUTES * 60000)
  end
end
return cmsgpack.pack({
  now,
  meta_number('published'),
  queue_id(),
  waiting,
  now - oldest_at,
  redis.call('HGET', LIMIT, 'members') or replica,
  late,
  time_slot_ms(),
  subscribers_of(replica),
  logs,
  run_id,
  held_back,
  garbage,
})
