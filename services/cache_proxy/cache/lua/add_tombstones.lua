-- Pairs are invalidated: whoever is asking the model for them now must not have its answer remembered.
-- KEYS[1]  the tombstones, beside the miss queue's keys: a sorted set, digest (or `*`, all) -> when, in milliseconds
-- ARGV[1]  the digests, 16 bytes each; empty: all
-- ARGV[2…] what the keys of the miss queue begin with in its further formats
local DIGEST, KEPT_MS, CHUNK = 16, 86400000, 400 -- longer than a replica may be cut off with answers to be kept
local TOMBS, digests = KEYS[1], ARGV[1]
local BASES = { string.sub(TOMBS, 1, -#'tombs' - 1), unpack(ARGV, 2) }
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local function heal(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then
    redis.call('UNLINK', key)
  end
end

local function each_chunk(act)
  for first = 1, #digests, DIGEST * CHUNK do
    local chunk = {}
    for at = first, math.min(#digests, first + DIGEST * CHUNK - 1), DIGEST do
      chunk[#chunk + 1] = string.sub(digests, at, at + DIGEST - 1)
    end
    act(chunk)
  end
end

-- What the queue remembers of late (`remember` in its prelude) goes too.
for _, base in ipairs(BASES) do
  for kind, period in pairs({ recent = 60000, refused = 600000 }) do
    for ago = 0, 1 do
      local key = base .. kind .. ':' .. (math.floor(now / period) - ago)
      heal(key, 'hash')
      if digests == '' then
        redis.call('UNLINK', key)
      end
      each_chunk(function(chunk)
        redis.call('HDEL', key, unpack(chunk))
      end)
    end
  end
end
heal(TOMBS, 'zset')
redis.call('ZREMRANGEBYSCORE', TOMBS, '-inf', now - KEPT_MS)
redis.call('ZREMRANGEBYSCORE', TOMBS, '(' .. now + KEPT_MS, '+inf') -- garbage
if digests == '' then
  redis.call('ZADD', TOMBS, now, '*')
end
each_chunk(function(chunk)
  for _, digest in ipairs(chunk) do
    redis.call('ZADD', TOMBS, now, digest)
  end
end)
redis.call('PEXPIRE', TOMBS, KEPT_MS)
return redis.status_reply('OK')
