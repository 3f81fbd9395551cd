-- What a tag holds, and what some of its buckets are like.
-- ARGV[1]  how many buckets to look at   ARGV[2]  a number from 0 up to 1: which ones
-- Returns  {generation, buckets, pairs, 1 if earlier generations have left something, {encoding, pairs, bytes, …}}
local state = load_state(KEYS[1])
if not state then
  return { '', 0, 0, 0, {}, garbage }
end
local samples, first = {}, column_of(state.buckets, 0)
for sample = 0, tonumber(ARGV[1]) - 1 do
  local at = (tonumber(ARGV[2]) + sample / tonumber(ARGV[1])) % 1
  local bucket = state.prefix .. format('%x', (first + floor(at * first)) * COLUMNS)
  local encoding = call('OBJECT', 'ENCODING', bucket)
  if encoding then
    local pairs_of_it, bytes = try('HLEN', bucket), call('MEMORY', 'USAGE', bucket, 'SAMPLES', 0)
    samples[#samples + 1] = encoding
    samples[#samples + 1] = is_error(pairs_of_it) and 0 or pairs_of_it
    samples[#samples + 1] = bytes
  end
end
local old = call('HEXISTS', KEYS[1], 'old')
return { state.generation, state.buckets, state.pairs, old, samples, garbage }
