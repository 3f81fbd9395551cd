-- Look up a batch of pairs.
--
-- ARGV[1]  digests, 16 bytes each, one after the other
-- Reply    {two bytes for each digest: day * 8 + level, the low byte first, 0 if there is no answer,
--           values that were garbage,
--           the time of this server, by which answers age: seconds since 1970 with decimals}
local digests = ARGV[1]

-- By tag the prefix of its buckets' names, false if it has no state; by first byte the parameters of its
-- column.
local prefixes, firsts, scales = {}, {}, {}
local entries, count = {}, 0
-- Value -> entry: a batch has few different values.
local known = { [false] = '\0\0' }

local function load_tag(tag)
  local state = load_state(tag_key(tag))
  prefixes[tag] = state and state.prefix or false
  if state then
    for column = 0, COLUMNS - 1 do
      local at = tag * COLUMNS + column
      firsts[at], scales[at] = column_of(state.buckets, column)
    end
  end
end

local function entry_of(value)
  local level, day = unpack_value(value)
  local entry = false
  if level then
    entry = string.char((day * 8 + level) % 256, floor((day * 8 + level) / 256))
  end
  if type(value) == 'string' then
    known[value] = entry
  end
  return entry
end

-- Hexadecimal digits of numbers: there are few different ones, and formatting takes longer than a look-up.
local plain, padded = {}, {}

local function format_once(formatted, form, number)
  formatted[number] = format(form, number)
  return formatted[number]
end

for at = 1, #digests, 16 do
  local b0, b1, b2, b3 = byte(digests, at, at + 3)
  local column = b0 % COLUMNS
  local tag = (b0 - column) / COLUMNS
  local prefix = prefixes[tag]
  if prefix == nil then
    load_tag(tag)
    prefix = prefixes[tag]
  end
  local value = false
  if prefix then
    local number = bucket_number(b1, b2, b3, firsts[b0], scales[b0]) * COLUMNS + column
    local bucket
    if number < 256 then
      bucket = prefix .. (plain[number] or format_once(plain, '%x', number))
    else
      local low = number % 256
      local high = (number - low) / 256
      local first_digits = plain[high] or format_once(plain, '%x', high)
      bucket = prefix .. first_digits .. (padded[low] or format_once(padded, '%02x', low))
    end
    value = try('HGET', bucket, sub(digests, at + 1, at + 11))
  end
  count = count + 1
  local entry = known[value]
  if entry == nil then
    entry = entry_of(value)
  end
  if not entry then
    garbage = garbage + 1
  end
  entries[count] = entry or '\0\0'
end
return { table.concat(entries), garbage, format('%d.%06d', now, microseconds) }
