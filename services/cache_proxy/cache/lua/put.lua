-- Remember a batch of levels. Repeating it changes nothing.
-- ARGV[1]  17 bytes an answer: the digest, then the level as one byte
-- ARGV[2]  the day that they were inferred on; empty: today. Of an earlier day nothing newer is overwritten.
-- Returns  how much was garbage, and is healed
local answers, day = ARGV[1], tonumber(ARGV[2])
local is_new = not day or day >= today
day = math.min(day or today, today)
local added, values = {}, {}
for level = 1, 7 do
  values[level] = format('%d', pack_value(level, day))
end

local function is_known(bucket, field)
  local value = try('HGET', bucket, field)
  local _, known_day = unpack_value(value)
  return known_day and known_day > day
end

for at = 1, #answers, 17 do
  local b0, b1, b2, b3 = byte(answers, at, at + 3)
  local column = b0 % COLUMNS
  local tag = (b0 - column) / COLUMNS
  local state = states[tag] or state_of(tag)
  local firsts = state.firsts
  if not firsts then
    firsts = { scales = {} }
    for each = 0, COLUMNS - 1 do
      firsts[each], firsts.scales[each] = column_of(state.buckets, each)
    end
    state.firsts, added[tag] = firsts, 0
  end
  local number = bucket_number(b1, b2, b3, firsts[column], firsts.scales[column])
  local bucket, field = state.prefix .. format('%x', number * COLUMNS + column), sub(answers, at + 1, at + 11)
  if is_new or not is_known(bucket, field) then
    added[tag] = added[tag] + write(bucket, field, values[byte(answers, at + 16)])
  end
end
for tag, count in pairs(added) do
  local state = states[tag]
  state.pairs = state.pairs + count
  -- Twice as fast as pairs come, so that it catches up; bounded, so that Redis is not held.
  for _ = 1, 2 + floor(count * 2 / LOAD) do
    if state.pairs <= LOAD * state.buckets then
      break
    end
    split(state)
  end
  save(state)
end
return garbage
