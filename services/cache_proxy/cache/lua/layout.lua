-- Where a pair is kept. What every script of the store begins with.
--
-- KEYS[1]  the state of a tag: BASE{3f}, a hash of `generation`, `buckets`, `pairs`, `swept` and `old`. A script may
--          touch every tag of its BASE on one server; on a Cluster it is told of one tag's pairs alone.
-- KEYS[2]  (Cluster) a key that never exists: while its slot is being moved, Redis answers TRYAGAIN at once instead
--          of running the script on those keys that are still here.
--
-- A digest's first byte chooses the tag (6 bits) and a column of it (2 bits); the eleven bytes behind are the
-- field. Within a column the cache grows one bucket at a time, and never all at once (Martin 1979, Larson 1988:
-- spiral storage): the buckets in use are numbered from `first` to 2 * first - 1; growing moves what is in
-- `first` to the buckets 2 * first and 2 * first + 1. The field's first bits are a place in an octave, stretched
-- so that low numbers get more: the bucket that is next to be split is always the fullest, and the fullest is
-- always 1.44 times the mean, whatever the size. `buckets` counts those of the four columns, which take turns.
-- (The curve is a parabola, not 2^h: it needs no libm, so every server and `layout.py` agree to the last bit.)
local BASE = string.match(KEYS[1], '^(.*){')
local COLUMNS, LOAD, DAY_0, LEAST = 4, 56, 1767225600, -4096
local floor, byte, sub, format = math.floor, string.byte, string.sub, string.format
local call, try = redis.call, redis.pcall

local clock = call('TIME')
local now, microseconds = tonumber(clock[1]), tonumber(clock[2])
local today = floor((now - DAY_0) / 86400)
local garbage = 0

local function whole(value, least, most)
  local found = type(value) == 'string' and #value < 12 and string.find(value, '^-?%d+$') and tonumber(value)
  return found and found >= least and found <= most and found or nil
end

-- A tag's state, or nil if it has none; what is no state is garbage.
local function load_state(key)
  local stored = try('HMGET', key, 'generation', 'buckets', 'pairs')
  if stored.err then
    garbage = garbage + 1
    return nil
  end
  local generation, buckets = stored[1], whole(stored[2], COLUMNS, 2 ^ 24)
  if generation and buckets and string.find(generation, '^%x+$') then
    return { key = key, prefix = key .. generation .. ':', generation = generation, buckets = buckets,
      pairs = whole(stored[3], 0, 2 ^ 40) or 0 }
  end
  if stored[1] or stored[2] or stored[3] then
    garbage = garbage + 1
  end
  return nil
end

local function tag_key(tag)
  return format('%s{%02x}', BASE, tag)
end

-- Where a column's buckets begin, and the power of two below that.
local function column_of(buckets, column)
  local first, scale = floor((buckets + COLUMNS - 1 - column) / COLUMNS), 1
  while scale * 2 <= first do
    scale = scale * 2
  end
  return first, scale
end

local function bucket_number(b1, b2, b3, first, scale)
  local h = ((b1 * 256 + b2) * 256 + b3) / 16777216
  local place = (1 + h * (0.6565 + 0.3435 * h)) * scale
  if place < first then
    place = place * 2
  end
  return place - place % 1 -- rounded down, with no call
end

-- The value of a field: seven levels a day from LEAST on, so that a listpack keeps it in three bytes until 2029,
-- and in four until 2040.
local function pack_value(level, day)
  return LEAST + day * 7 + level - 1
end

local function unpack_value(value) -- level, day; nil if it is garbage
  local found = whole(value, LEAST, 2 ^ 17)
  if not found then
    return nil
  end
  local day = floor((found - LEAST) / 7)
  if day > today + 1 then
    return nil
  end
  return (found - LEAST) % 7 + 1, day
end

local function is_error(reply)
  return type(reply) == 'table' and reply.err
end

local function is_wrong_type(reply)
  return is_error(reply) and string.find(reply.err, 'WRONGTYPE', 1, true)
end
