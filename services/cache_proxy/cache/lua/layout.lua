-- Where a pair is stored. Every script of the cache begins with this file.
--
-- KEYS[1]  the state of a tag: BASE{3f}, a hash of `generation`, `buckets`, `pairs`, `swept` and `old`. A
--          script may use every tag of its BASE on one server; on a Cluster it gets the pairs of one tag
--          alone
-- KEYS[2]  (on a Cluster) a key that never exists: while its slot moves, Redis replies TRYAGAIN at once
--          instead of running the script on those keys that have not moved yet
--
-- The first byte of a digest chooses the tag (6 bits) and a column of it (2 bits). The eleven bytes behind it
-- are the field.
--
-- Within a column the cache grows one bucket at a time, and never all at once (spiral storage: Martin 1979,
-- Larson 1988). The buckets in use are numbered from `first` to 2 * first - 1, and growing moves the pairs of
-- bucket `first` to the buckets 2 * first and 2 * first + 1. The first bits of the field are a position in an
-- octave, stretched so that low numbers get more: the bucket that is split next is always the fullest, and
-- the fullest is always 1.44 times the mean, whatever the size. `buckets` counts those of the four columns,
-- which take turns. (The curve is a parabola, not 2^h: it needs no libm, so every server and `buckets.py`
-- agree to the last bit.)
local BASE = string.match(KEYS[1], '^(.*){')
-- Pairs in a bucket on average; 2026-01-01, from which days are counted; the smallest value of a field.
local COLUMNS, MEAN_PAIRS, DAY_0, MIN_VALUE = 4, 56, 1767225600, -4096
local FIELD_BYTES = 11
local floor, byte, sub, format = math.floor, string.byte, string.sub, string.format
local call, try = redis.call, redis.pcall

local clock = call('TIME')
local now, microseconds = tonumber(clock[1]), tonumber(clock[2])
local today = floor((now - DAY_0) / 86400)
-- Values that were garbage.
local garbage = 0

local function to_integer(value, min, max)
  local found = type(value) == 'string' and #value < 12 and string.find(value, '^-?%d+$') and tonumber(value)
  return found and found >= min and found <= max and found or nil
end

-- Return the state of a tag, or nil if it has none, or garbage.
local function load_state(key)
  local stored = try('HMGET', key, 'generation', 'buckets', 'pairs')
  if stored.err then
    garbage = garbage + 1
    return nil
  end
  local generation = stored[1]
  local buckets = to_integer(stored[2], COLUMNS, 2 ^ 24)
  if generation and buckets and string.find(generation, '^%x+$') then
    return {
      key = key,
      prefix = key .. generation .. ':',
      generation = generation,
      buckets = buckets,
      pairs = to_integer(stored[3], 0, 2 ^ 40) or 0,
    }
  end
  if stored[1] or stored[2] or stored[3] then
    garbage = garbage + 1
  end
  return nil
end

local function tag_key(tag)
  return format('%s{%02x}', BASE, tag)
end

-- Return where the buckets of a column begin, and the power of two at or below that.
local function column_of(buckets, column)
  local first, scale = floor((buckets + COLUMNS - 1 - column) / COLUMNS), 1
  while scale * 2 <= first do
    scale = scale * 2
  end
  return first, scale
end

-- Return the number of a pair's bucket in its column. (It is rounded down without a call.)
local function bucket_number(b1, b2, b3, first, scale)
  local h = ((b1 * 256 + b2) * 256 + b3) / 16777216
  local position = (1 + h * (0.6565 + 0.3435 * h)) * scale
  if position < first then
    position = position * 2
  end
  return position - position % 1
end

-- Return the value of a field: seven levels for each day from MIN_VALUE on, so that a listpack stores it in
-- three bytes until 2029, and in four until 2040.
local function pack_value(level, day)
  return MIN_VALUE + day * 7 + level - 1
end

-- Return level and day of a value, nil if it is garbage.
local function unpack_value(value)
  local found = to_integer(value, MIN_VALUE, 2 ^ 17)
  if not found then
    return nil
  end
  local day = floor((found - MIN_VALUE) / 7)
  if day > today + 1 then
    return nil
  end
  return (found - MIN_VALUE) % 7 + 1, day
end

local function is_error(reply)
  return type(reply) == 'table' and reply.err
end

local function is_wrong_type(reply)
  return is_error(reply) and string.find(reply.err, 'WRONGTYPE', 1, true)
end
