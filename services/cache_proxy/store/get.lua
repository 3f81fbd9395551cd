-- Look up a batch of pairs.
-- KEYS[1]  the namespace's base key; buckets are this key and five hex digits
-- ARGV[1]  the digests, 16 bytes each, one after the other: the first 18 bits that are picked below choose
--          the bucket, the last 12 bytes are the field
-- Returns  {one byte a digest: its level, or 0; how many values were garbage}
local base, digests = KEYS[1], ARGV[1]
local levels, count, garbage = {}, 0, 0
for at = 1, #digests, 16 do
  local first, second, third = string.byte(digests, at, at + 2)
  local bucket = string.format('%s%05x', base, first * 1024 + second * 4 + third % 4)
  local value = redis.pcall('HGET', bucket, string.sub(digests, at + 4, at + 15))
  local level = 0
  if value then
    local number = type(value) == 'string' and string.match(value, '^%d+$') and tonumber(value)
    level = number and number < 65536 and number % 8 or 0 -- the day has 13 bits, the level 3
    if level == 0 then
      garbage = garbage + 1
    end
  end
  count = count + 1
  levels[count] = string.char(level)
end
return { table.concat(levels), garbage }
