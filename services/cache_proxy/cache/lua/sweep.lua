-- Delete what is obsolete in the next few buckets of a tag: buckets of earlier generations, and in the others
-- what is expired or garbage. The position is kept in Redis, so replicas share the work.
--
-- KEYS[1]  the state of the tag
-- ARGV[1]  how many days an answer is kept, by Redis's own clock; empty: for ever
-- ARGV[2]  maximum number of buckets
-- Reply    {pairs that were deleted, values that were garbage, 1 if buckets of earlier generations are left}
local kept_days = tonumber(ARGV[1])
local max_buckets = tonumber(ARGV[2])
local oldest_day = kept_days and today - kept_days + 1 or -1
local state = load_state(KEYS[1])
local deleted = 0

-- Return the name of the bucket at a position, counted from 0; nil where a column has no more.
local function bucket_name(buckets, position)
  local column = position % COLUMNS
  local first, number = column_of(buckets, column), floor(position / COLUMNS)
  return number < first and format('%x', (first + number) * COLUMNS + column) or nil
end

local function count_positions(buckets)
  return floor((buckets + COLUMNS - 1) / COLUMNS) * COLUMNS
end

-- Delete buckets of the first of the earlier generations. Return whether there was one. Field `old` is a list
-- of `generation,buckets,position;`.
local function delete_old()
  local old = call('HGET', KEYS[1], 'old')
  if not old then
    return false
  end
  local generation, buckets, position, rest = string.match(old, '^(%x+),(%d+),(%d+);(.*)$')
  if not (generation and to_integer(buckets, 0, 2 ^ 24)) then
    call('HDEL', KEYS[1], 'old')
    return false
  end
  local stop = math.min(position + max_buckets, count_positions(buckets))
  for each = position, stop - 1 do
    local name = bucket_name(buckets, each)
    if name then
      call('UNLINK', KEYS[1] .. generation .. ':' .. name)
    end
  end
  if stop < count_positions(buckets) then
    rest = format('%s,%s,%d;%s', generation, buckets, stop, rest)
  end
  if rest == '' then
    call('HDEL', KEYS[1], 'old')
    return false
  end
  call('HSET', KEYS[1], 'old', rest)
  return true
end

local function sweep(bucket)
  local stored, gone = fields_of(bucket), {}
  for at = 1, #stored, 2 do
    local level, day = unpack_value(stored[at + 1])
    local is_counted = #stored[at] == FIELD_BYTES
    if not level or not is_counted then
      garbage = garbage + 1
      gone[#gone + 1] = stored[at]
      state.pairs = state.pairs - (is_counted and 1 or 0)
    elseif day < oldest_day then
      deleted = deleted + 1
      gone[#gone + 1] = stored[at]
      state.pairs = state.pairs - 1
    end
  end
  for at = 1, #gone, CHUNK_ARGUMENTS do
    call('HDEL', bucket, unpack(gone, at, math.min(at + CHUNK_ARGUMENTS - 1, #gone)))
  end
end

if not state then
  return { 0, garbage, 0 }
end
allow_writes_when_full()
if delete_old() then
  return { 0, garbage, 1 }
end
local position = to_integer(call('HGET', KEYS[1], 'swept'), 0, 2 ^ 24) or 0
local stop = position + max_buckets
for each = position, stop - 1 do
  local name = bucket_name(state.buckets, each)
  if name then
    sweep(state.prefix .. name)
  end
end
save_state(state)
call('HSET', KEYS[1], 'swept', stop < count_positions(state.buckets) and stop or 0)
return { deleted, garbage, 0 }
