-- Which of these were invalidated since they were claimed: answers that were on their way are not remembered.
-- ARGV[1]  when their claim was granted, ms   ARGV[2]  digests, 16 bytes each
-- Returns  those digests
-- The tombstones are `cache-proxy invalidate`'s (store/lua/bury.lua): digest, or `*`, and when.
local since, digests, found = tonumber(ARGV[1]), split(ARGV[2]), {}
local TOMBS = BASE .. 'tombs'
if redis.call('TYPE', TOMBS).ok ~= 'zset' then
  redis.call('UNLINK', TOMBS) -- nothing, or garbage
  return ''
end
local all = number(redis.call('ZSCORE', TOMBS, '*'))
for _, digest in ipairs(digests) do
  local at = number(redis.call('ZSCORE', TOMBS, digest))
  if (all and all >= since) or (at and at >= since) then
    found[#found + 1] = digest
  end
end
for ago = 0, #found > 0 and 1 or -1 do
  in_chunks('HDEL', recent_key('recent', RECENT_MS, ago), found)
end
return table.concat(found)
