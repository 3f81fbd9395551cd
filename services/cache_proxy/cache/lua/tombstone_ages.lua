-- Return how long ago pairs were invalidated. An answer that was requested from the model before must not be
-- stored.
--
-- KEYS[1]  the tombstones (see add_tombstones.lua)
-- ARGV[1]  digests, 16 bytes each
-- Reply    milliseconds for each digest, -1 where it was not invalidated; empty if there are no tombstones
local TOMBSTONES = KEYS[1]
local digests = ARGV[1]
local ages = {}
if redis.call('TYPE', TOMBSTONES).ok ~= 'zset' then
  return ages
end
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

-- A time that is further in the future than a tombstone is kept is garbage.
local KEPT_MS = 86400000
local function invalidated_at(member)
  local found = tonumber(redis.call('ZSCORE', TOMBSTONES, member) or -1)
  return found and found <= now + KEPT_MS and found or -1
end

local all_invalidated_at = invalidated_at('*')
for at = 1, #digests, 16 do
  local last = math.max(all_invalidated_at, invalidated_at(string.sub(digests, at, at + 15)))
  ages[#ages + 1] = last < 0 and -1 or math.max(0, now - last)
end
return ages
