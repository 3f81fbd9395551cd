-- Heartbeat of a replica whose queue format differs from that of the replicas that use the shared queue.
--
-- It reads and writes only the membership of the fleet, which all formats share, and no record of the queue.
-- While it stands by, the replica is for the others a member that lost Redis: a silent one. It calls the
-- model only in the time slots that the list of members gives it, which the others leave free (see
-- claim.lua).
--
-- The list changes only while all members send heartbeats. So while a replica that stands by is not in it,
-- all that stand by send heartbeats that the others see, and call nothing, until the list has them and they
-- have been silent again.
--
-- ARGV[1]  replica
-- ARGV[2]  host:port of its HTTP endpoint
-- ARGV[3]  pairs per second, [4] calls per second, [5] pairs in a batch: used if Redis has none, or garbage
-- ARGV[6]  msgpack list of the keys of the logs of invalidations that it follows
-- ARGV[7]  1 if the replica ends: then it leaves the membership
-- Reply    msgpack list:
--          {true} if the shared queue has this replica's format now, perhaps since this call; otherwise
--          {false, the format in use, now ms, members, ms between time slots, ms since the others last saw a
--          heartbeat of this replica, the last entry of each log (false if it has none)}

-- Two heartbeats that follow each other are closer together than CONNECTED_MS. A replica that uses the shared
-- queue and is silent for GONE_MS has ended, or lost Redis.
local CONNECTED_MS, GONE_MS = 1500, 3000
local RENEWED_MS, FORGOTTEN_MS, MAX_STANDBY = 300000, 600000, 1000
local replica = ARGV[1]
local address = ARGV[2]
own_limits = {
  pairs_per_second = tonumber(ARGV[3]),
  calls_per_second = tonumber(ARGV[4]),
  batch_pairs = tonumber(ARGV[5]),
}

if redis.call('TYPE', STANDBY).ok ~= 'hash' or redis.call('HLEN', STANDBY) > MAX_STANDBY then
  redis.call('UNLINK', STANDBY)
end
if ARGV[7] == '1' then
  redis.call('HDEL', STANDBY, replica)
  redis.call('ZREM', REPLICAS, replica)
  redis.call('HDEL', ADDRESSES, replica)
  return cmsgpack.pack({ true })
end

-- All replicas that stand by, and when each sent its last heartbeat.
local standing_by = {}
local stored = redis.call('HGETALL', STANDBY)
for at = 1, #stored, 2 do
  local seen_at = to_number(string.match(stored[at + 1], '^%d+:(%d+)$'))
  if seen_at and math.abs(now - seen_at) <= FORGOTTEN_MS then
    standing_by[stored[at]] = seen_at
  else
    redis.call('HDEL', STANDBY, stored[at])
  end
end

-- Whether a replica uses the shared queue, in whatever format.
local function is_queue_used()
  local is_used, is_alive = false, false
  local known = redis.call('ZRANGE', REPLICAS, 0, -1, 'WITHSCORES')
  for at = 1, #known, 2 do
    if known[at] ~= replica and not standing_by[known[at]] then
      is_used = true
      is_alive = is_alive or now - (to_number(known[at + 1]) or 0) <= GONE_MS
    end
  end
  -- Replicas that were killed stay in the membership. They count as gone if they were silent while this
  -- replica had Redis: after an outage, all replicas come back in any order.
  local was_connected = standing_by[replica] and now - standing_by[replica] <= CONNECTED_MS
  return is_used and (is_alive or not was_connected)
end

local found = fleet_format()
if found ~= FORMAT and not is_queue_used() then
  found = FORMAT
  redis.call('HSET', LIMIT, 'format', FORMAT)
end
redis.call('HSET', ADDRESSES, replica, address)
if found == FORMAT then
  redis.call('HDEL', STANDBY, replica)
  redis.call('ZADD', REPLICAS, now, replica)
  return cmsgpack.pack({ true })
end

-- Send a heartbeat that the others see only if the list of members has to change, or before they forget this
-- replica.
standing_by[replica] = now
redis.call('HSET', STANDBY, replica, FORMAT .. ':' .. now)
redis.call('HDEL', PAUSED, replica)
local members = redis.call('HGET', LIMIT, 'members') or ''
local is_member, is_complete = {}, true
for member in string.gmatch(members, '[^,]+') do
  is_member[member] = true
end
for other, seen_at in pairs(standing_by) do
  is_complete = is_complete and (is_member[other] or now - seen_at > CONNECTED_MS)
end
local heartbeat_at = to_number(redis.call('ZSCORE', REPLICAS, replica))
if not is_complete or not heartbeat_at or heartbeat_at > now or now - heartbeat_at > RENEWED_MS then
  redis.call('ZADD', REPLICAS, now, replica)
  heartbeat_at = now
end
local logs = last_log_entries(cmsgpack.unpack(ARGV[6]))
return cmsgpack.pack({ false, found, now, members, time_slot_ms(), now - heartbeat_at, logs })
