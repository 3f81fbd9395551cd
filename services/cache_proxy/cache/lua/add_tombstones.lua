-- Record that pairs are invalidated: an answer that was requested from the model before must not be
-- remembered.
--
-- KEYS[1]   the tombstones, beside the keys of the miss queue: a sorted set, digest (or `*`: all) -> time, ms
-- ARGV[1]   digests, 16 bytes each; empty: all pairs
-- ARGV[2…]  what the keys of the miss queue begin with in its further formats
-- Reply     OK

-- Tombstones are kept for longer than a replica may be without Redis and hold answers that it has to store.
local DIGEST_BYTES, KEPT_MS, CHUNK_DIGESTS = 16, 86400000, 400
local TOMBSTONES = KEYS[1]
local BASES = { string.sub(TOMBSTONES, 1, -#'tombs' - 1), unpack(ARGV, 2) }
local digests = ARGV[1]
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local function delete_unless(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then
    redis.call('UNLINK', key)
  end
end

local function each_chunk(act)
  for first = 1, #digests, DIGEST_BYTES * CHUNK_DIGESTS do
    local chunk = {}
    for at = first, math.min(#digests, first + DIGEST_BYTES * CHUNK_DIGESTS - 1), DIGEST_BYTES do
      chunk[#chunk + 1] = string.sub(digests, at, at + DIGEST_BYTES - 1)
    end
    act(chunk)
  end
end

-- Delete the recent outcomes that the queue remembers (see `remember` in its prelude).
for _, base in ipairs(BASES) do
  for kind, period in pairs({ recent = 60000, refused = 600000 }) do
    for ago = 0, 1 do
      local key = base .. kind .. ':' .. (math.floor(now / period) - ago)
      delete_unless(key, 'hash')
      if digests == '' then
        redis.call('UNLINK', key)
      end
      each_chunk(function(chunk)
        redis.call('HDEL', key, unpack(chunk))
      end)
    end
  end
end

-- Add the tombstones, and delete those that are old, or garbage because they are in the future.
delete_unless(TOMBSTONES, 'zset')
redis.call('ZREMRANGEBYSCORE', TOMBSTONES, '-inf', now - KEPT_MS)
redis.call('ZREMRANGEBYSCORE', TOMBSTONES, '(' .. now + KEPT_MS, '+inf')
if digests == '' then
  redis.call('ZADD', TOMBSTONES, now, '*')
end
each_chunk(function(chunk)
  for _, digest in ipairs(chunk) do
    redis.call('ZADD', TOMBSTONES, now, digest)
  end
end)
redis.call('PEXPIRE', TOMBSTONES, KEPT_MS)
return redis.status_reply('OK')
