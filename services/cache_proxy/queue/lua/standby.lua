-- Heartbeat of a replica whose queue format differs from that of the replicas that use the shared queue. It reads and
-- writes the fleet's membership alone, which all formats share, and no record of the queue.
--
-- While it stands by, the replica is for the others one that has lost Redis: a silent member. It calls the model in the
-- moments that the members' list gives it, which the others leave alone (see claim.lua). The list changes only while every
-- replica is heard of. So whenever a replica that stands by is not in the list, all that stand by are heard of for a
-- moment, and call nobody until the list has them and they have been silent again.
--
-- ARGV[1]  replica   ARGV[2]  host:port of its HTTP
-- ARGV[3]  pairs a second, [4] calls a second, [5] pairs in a batch: if Redis has none that can be read
-- ARGV[6]  msgpack list of the keys of the logs of invalidations that it follows
-- ARGV[7]  1 if the replica ends: then it leaves the membership
-- Returns  msgpack {true}: the shared queue has this replica's format now, perhaps since this very call
--          msgpack {false, the format found, now ms, members, ms between moments, ms since this replica was last heard
--          of as others see it, the last entry of each log, false if it has none}
local CONNECTED_MS = 1500 -- two heartbeats that follow each other are closer together
local GONE_MS = 3000 -- whoever uses the shared queue and is silent for so long has ended, or lost Redis
local RENEWED_MS, FORGOTTEN_MS, MAX_STANDBY = 300000, 600000, 1000
local replica, address = ARGV[1], ARGV[2]
own = { pairs_per_second = tonumber(ARGV[3]), calls_per_second = tonumber(ARGV[4]), batch_pairs = tonumber(ARGV[5]) }

if redis.call('TYPE', STANDBY).ok ~= 'hash' or redis.call('HLEN', STANDBY) > MAX_STANDBY then
  redis.call('UNLINK', STANDBY) -- garbage, or nothing
end
if ARGV[7] == '1' then
  redis.call('HDEL', STANDBY, replica)
  redis.call('ZREM', REPLICAS, replica)
  redis.call('HDEL', ADDRESSES, replica)
  return cmsgpack.pack({ true })
end

-- Who else stands by: replica -> when it was last heard of.
local standing_by, found = {}, fleet_format()
do
  local stored = redis.call('HGETALL', STANDBY)
  for at = 1, #stored, 2 do
    local seen = number(string.match(stored[at + 1], '^%d+:(%d+)$'))
    if seen and math.abs(now - seen) <= FORGOTTEN_MS then
      standing_by[stored[at]] = seen
    else
      redis.call('HDEL', STANDBY, stored[at])
    end
  end
end

-- The queue changes its format when no replica that uses it is left. One that was killed, or has lost Redis, counts as
-- gone after a while, in which this replica has had Redis itself: after an outage all come back, in any order.
if found ~= FORMAT then
  local is_used, is_heard = false, false
  local known = redis.call('ZRANGE', REPLICAS, 0, -1, 'WITHSCORES')
  for at = 1, #known, 2 do
    if known[at] ~= replica and not standing_by[known[at]] then
      is_used = true
      is_heard = is_heard or now - (number(known[at + 1]) or 0) <= GONE_MS
    end
  end
  local was_connected = standing_by[replica] and now - standing_by[replica] <= CONNECTED_MS
  if not is_used or (was_connected and not is_heard) then
    found = FORMAT
    redis.call('HSET', LIMIT, 'format', FORMAT)
  end
end
redis.call('HSET', ADDRESSES, replica, address)
if found == FORMAT then
  redis.call('HDEL', STANDBY, replica)
  redis.call('ZADD', REPLICAS, now, replica)
  return cmsgpack.pack({ true })
end

standing_by[replica] = now
redis.call('HSET', STANDBY, replica, FORMAT .. ':' .. now)
redis.call('HDEL', PAUSED, replica)
local members, is_member, is_complete = redis.call('HGET', LIMIT, 'members') or '', {}, true
for member in string.gmatch(members, '[^,]+') do
  is_member[member] = true
end
for other, seen in pairs(standing_by) do
  is_complete = is_complete and (is_member[other] or now - seen > CONNECTED_MS)
end
local heard = number(redis.call('ZSCORE', REPLICAS, replica))
if not is_complete or not heard or heard > now or now - heard > RENEWED_MS then
  redis.call('ZADD', REPLICAS, now, replica)
  heard = now
end
local logs = cmsgpack.unpack(ARGV[6])
for at, log in ipairs(logs) do
  local last = redis.pcall('LINDEX', log, -1)
  logs[at] = type(last) == 'table' and 'garbage' or last
end
return cmsgpack.pack({ false, found, now, members, moment_ms(), now - heard, logs })
