-- Store a batch of levels. Repeating it changes nothing.
--
-- ARGV[1]  17 bytes for each answer: the digest, then the level as one byte
-- ARGV[2]  the day on which they were inferred; empty: today. With an earlier day, newer answers are kept
-- Reply    how many values were garbage, and were replaced
local answers = ARGV[1]
local day = tonumber(ARGV[2])
local is_today = not day or day >= today
day = math.min(day or today, today)

-- Tag -> pairs that are new; level -> value.
local added, values = {}, {}
for level = 1, 7 do
  values[level] = format('%d', pack_value(level, day))
end

local function is_newer(bucket, field)
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
    state.firsts = firsts
    added[tag] = 0
  end
  local number = bucket_number(b1, b2, b3, firsts[column], firsts.scales[column])
  local bucket = state.prefix .. format('%x', number * COLUMNS + column)
  local field = sub(answers, at + 1, at + 11)
  if is_today or not is_newer(bucket, field) then
    added[tag] = added[tag] + set_fields(bucket, field, values[byte(answers, at + 16)])
  end
end

-- Split buckets of tags that have grown: twice as fast as pairs come, so that the split catches up, and with
-- a bound, so that Redis is not blocked.
for tag, count in pairs(added) do
  local state = states[tag]
  state.pairs = state.pairs + count
  for _ = 1, 2 + floor(count * 2 / MEAN_PAIRS) do
    if state.pairs <= MEAN_PAIRS * state.buckets then
      break
    end
    split_bucket(state)
  end
  save_state(state)
end
return garbage
