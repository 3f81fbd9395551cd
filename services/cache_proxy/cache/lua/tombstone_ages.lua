-- How long ago pairs were invalidated: whoever asked the model before that must not have its answer remembered.
-- KEYS[1]  the tombstones (see add_tombstones.lua)   ARGV[1]  digests, 16 bytes each
-- Returns  milliseconds for each digest, -1 where it was not; nothing at all if there are no tombstones
local TOMBS, digests, ages = KEYS[1], ARGV[1], {}
if redis.call('TYPE', TOMBS).ok ~= 'zset' then
  return ages
end
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local KEPT_MS = 86400000 -- see add_tombstones.lua: what is further in the future than that is garbage
local function buried_at(member)
  local found = tonumber(redis.call('ZSCORE', TOMBS, member) or -1)
  return found and found <= now + KEPT_MS and found or -1
end

local all = buried_at('*')
for at = 1, #digests, 16 do
  local last = math.max(all, buried_at(string.sub(digests, at, at + 15)))
  ages[#ages + 1] = last < 0 and -1 or math.max(0, now - last)
end
return ages
