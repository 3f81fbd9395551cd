-- Look at the next few buckets of a tag: those that an earlier generation left behind are dropped, and in the
-- others what is expired or garbage. Where it stopped is kept in Redis, so replicas share the work.
-- ARGV[1]  how many days an answer is kept, by Redis's own clock; empty: for ever   ARGV[2]  how many buckets, at most
-- Returns  {how many pairs were removed, how much garbage, 1 if earlier generations have left something}
local kept, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local oldest = kept and today - kept + 1 or -1
local state, removed = load_state(KEYS[1]), 0

-- The buckets in use, by a running number from 0 on; nil where a column has no more.
local function nth(buckets, place)
  local column = place % COLUMNS
  local first, number = column_of(buckets, column), floor(place / COLUMNS)
  return number < first and format('%x', (first + number) * COLUMNS + column) or nil
end

local function places(buckets)
  return floor((buckets + COLUMNS - 1) / COLUMNS) * COLUMNS
end

local function drop_old()
  local old = call('HGET', KEYS[1], 'old')
  if not old then
    return false
  end
  local generation, buckets, place, rest = string.match(old, '^(%x+),(%d+),(%d+);(.*)$')
  if not (generation and whole(buckets, 0, 2 ^ 24)) then
    call('HDEL', KEYS[1], 'old')
    return false
  end
  local stop = math.min(place + most, places(buckets))
  for each = place, stop - 1 do
    local name = nth(buckets, each)
    if name then
      call('UNLINK', KEYS[1] .. generation .. ':' .. name)
    end
  end
  if stop < places(buckets) then
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
    local counted = #stored[at] == 11
    if not level or not counted then
      garbage = garbage + 1
      gone[#gone + 1] = stored[at]
      state.pairs = state.pairs - (counted and 1 or 0)
    elseif day < oldest then
      removed = removed + 1
      gone[#gone + 1] = stored[at]
      state.pairs = state.pairs - 1
    end
  end
  for at = 1, #gone, CHUNK do
    call('HDEL', bucket, unpack(gone, at, math.min(at + CHUNK - 1, #gone)))
  end
end

if not state then
  return { 0, garbage, 0 }
end
go_on_when_full()
if drop_old() then
  return { 0, garbage, 1 }
end
local place = whole(call('HGET', KEYS[1], 'swept'), 0, 2 ^ 24) or 0
local stop = place + most
for each = place, stop - 1 do
  local name = nth(state.buckets, each)
  if name then
    sweep(state.prefix .. name)
  end
end
save(state)
call('HSET', KEYS[1], 'swept', stop < places(state.buckets) and stop or 0)
return { removed, garbage, 0 }
