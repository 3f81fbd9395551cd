-- A replica is alive, and really holds these claims.
-- ARGV[1]  replica   ARGV[2]  msgpack list of the ids of the claims that it holds   ARGV[3]  host:port of its HTTP
-- ARGV[4]  1 after it was without Redis: it may just have called the model in a slot of its own
-- ARGV[5]  pairs a second, [6] calls a second, [7] pairs in a batch: if they were lost or cannot be read
-- ARGV[8]  msgpack list of the keys of the logs of invalidations that it follows
-- ARGV[9]  the server that its last heartbeat reached; empty: this is the first. Under another, too, it may just have called
-- ARGV[10] msgpack list of {minute, report}: what it counted, for the status page
-- Returns  msgpack {now ms, published, queue's id, {interactive, bulk, refresh waiting},
--          ms since the oldest came for which a caller waits, members (who has which slot if Redis is lost),
--          {replica, address} of those to knock at, ms between moments,
--          subscribers that this server has for the replica, the last entry of each log, false if it has none,
--          this server, pairs that wait because their accounts' quotas are spent,
--          names of what was garbage in Redis and is replaced}
local replica, held = ARGV[1], {}
local FORGOTTEN_MS, LATE_MS, MAX_NAME = 600000, 500, 64
for _, id in ipairs(cmsgpack.unpack(ARGV[2])) do
  held[id] = true
end
local garbage = {}
local function is_garbage(name, value, is_sound)
  garbage[#garbage + 1] = value and not is_sound and name or nil
  return value and not is_sound
end
for at, setting in ipairs({ 'pairs_per_second', 'calls_per_second', 'batch_pairs' }) do
  local value = redis.call('HGET', LIMIT, setting)
  local is_sound = setting == 'batch_pairs' and pairs_in_batch(false) or setting ~= 'batch_pairs' and rate_of(value)
  if not value or is_garbage(setting, value, is_sound) then
    redis.call('HSET', LIMIT, setting, ARGV[at + 4])
  end
end
-- Without an arrival time all may just have been spent: see claim.lua.
for _, moment in ipairs({ 'pairs_tat', 'calls_tat', 'not_before', 'quotas_since' }) do
  local value = redis.call('HGET', LIMIT, moment)
  local at = number(value)
  if is_garbage(moment, value, at and at <= now + slot_ms() + HOUR_MS) then
    redis.call('HDEL', LIMIT, moment)
  end
end
if redis.call('HGET', LIMIT, 'format') ~= tostring(FORMAT) then
  redis.call('HSET', LIMIT, 'format', FORMAT)
end
redis.call('HDEL', STANDBY, replica)
redis.call('ZADD', REPLICAS, now, replica)
redis.call('HSET', ADDRESSES, replica, ARGV[3])
redis.call('HDEL', PAUSED, replica)
redis.call('HDEL', ALONE, replica)
reap(replica, held)
local known = redis.call('ZRANGE', REPLICAS, 0, -1, 'WITHSCORES')
for at = 1, #known, 2 do
  local one, heard = known[at], number(known[at + 1])
  local is_sound = #one <= MAX_NAME and string.find(one, '^%x+$') and heard and heard <= now + FORGOTTEN_MS
  if is_garbage('replicas', one, is_sound) or heard <= now - FORGOTTEN_MS then
    redis.call('ZREM', REPLICAS, one)
    redis.call('HDEL', ADDRESSES, one)
    redis.call('HDEL', PAUSED, one)
    redis.call('HDEL', ALONE, one)
  end
end
local run = this_run()
if ARGV[4] == '1' or (ARGV[9] ~= '' and ARGV[9] ~= run) then
  redis.call('HSET', LIMIT,
    'calls_tat', math.max(number(redis.call('HGET', LIMIT, 'calls_tat')) or 0, now + slot_ms()),
    'pairs_tat', math.max(number(redis.call('HGET', LIMIT, 'pairs_tat')) or 0, now + slot_ms()))
  redis.call('HDEL', LIMIT, 'last') -- what a claim spent before is not given back
  suspect_quotas()
end

local waiting, oldest, held_back, any = {}, now, 0, redis.call('EXISTS', PAIRS) == 1
for at, priority in ipairs(LANES) do
  waiting[at] = 0
  for _, lane in ipairs(any and lanes_of(priority) or {}) do
    local count, account = redis.call('ZCARD', lane_key(lane)), account_of(lane)
    waiting[at] = waiting[at] + count
    if count > 0 and priority ~= 'refresh' then -- for that nobody waits
      local first = redis.call('ZRANGE', lane_key(lane), 0, 0)
      load_pairs(first)
      if records[first[1]] then
        oldest = math.min(oldest, records[first[1]].at)
      end
      if account and may_send(account, rates[account], now) == 0 then
        held_back = held_back + count
      end
    end
  end
end
local late = redis.call('ZRANGEBYSCORE', REPLICAS, '-inf', '(' .. (now - LATE_MS))
for at, gone in ipairs(late) do
  late[at] = { gone, redis.call('HGET', ADDRESSES, gone) or '' }
end
-- While somebody is silent, slots stay as the silent one knows them; who came since has none.
if #late == 0 then
  local all = redis.call('ZRANGE', REPLICAS, 0, -1)
  table.sort(all)
  redis.call('HSET', LIMIT, 'members', table.concat(all, ','))
end
local logs = cmsgpack.unpack(ARGV[8])
for at, log in ipairs(logs) do
  local last = redis.pcall('LINDEX', log, -1)
  logs[at] = type(last) == 'table' and 'garbage' or last
end
-- A report replaces the replica's own of that minute, so whoever says it twice counts nothing twice.
local REPORT_MINUTES, MOST_REPORTS = 12, 256
for _, report in ipairs(unpack_safely(ARGV[10]) or {}) do
  local minute, key = report[1], report_key(report[1])
  if redis.call('TYPE', key).ok ~= 'hash' then
    redis.call('DEL', key)
  end
  if math.abs(minute - now / 60000) < REPORT_MINUTES
    and (redis.call('HLEN', key) < MOST_REPORTS or redis.call('HEXISTS', key, replica) == 1)
    and redis.call('HSET', key, replica, report[2]) == 1 then
    redis.call('PEXPIRE', key, REPORT_MINUTES * 60000)
  end
end
return cmsgpack.pack({ now, meta('published'), queue_id(), waiting, now - oldest,
  redis.call('HGET', LIMIT, 'members') or replica, late, moment_ms(), subscribers_of(replica), logs, run, held_back, garbage })
