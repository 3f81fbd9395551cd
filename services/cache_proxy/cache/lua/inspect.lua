-- Return what a tag holds, and the encoding and size of some of its buckets.
--
-- KEYS[1]  the state of the tag
-- ARGV[1]  how many buckets to inspect
-- ARGV[2]  a number from 0 up to 1 that chooses them
-- Reply    {generation, buckets, pairs, 1 if buckets of earlier generations are left,
--           {encoding, pairs, bytes, and so on for each bucket}, values that were garbage}
local state = load_state(KEYS[1])
if not state then
  return { '', 0, 0, 0, {}, garbage }
end
local samples = {}
local first = column_of(state.buckets, 0)
for sample = 0, tonumber(ARGV[1]) - 1 do
  local at = (tonumber(ARGV[2]) + sample / tonumber(ARGV[1])) % 1
  local bucket = state.prefix .. format('%x', (first + floor(at * first)) * COLUMNS)
  local encoding = call('OBJECT', 'ENCODING', bucket)
  if encoding then
    local count = try('HLEN', bucket)
    local bytes = call('MEMORY', 'USAGE', bucket, 'SAMPLES', 0)
    samples[#samples + 1] = encoding
    samples[#samples + 1] = is_error(count) and 0 or count
    samples[#samples + 1] = bytes
  end
end
local old = call('HEXISTS', KEYS[1], 'old')
return { state.generation, state.buckets, state.pairs, old, samples, garbage }
