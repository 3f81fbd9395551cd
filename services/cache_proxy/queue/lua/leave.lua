-- Nobody waits at this replica any more: what is unsent and wanted nowhere else is forgotten.
-- ARGV[1]  replica   ARGV[2]  digests, 16 bytes each
local replica, digests = ARGV[1], split(ARGV[2])
load_pairs(digests)
for _, digest in ipairs(digests) do
  local pair = records[digest]
  if pair then
    pair.interest[replica] = nil
    if pair.claim or anybody_waits(pair) then
      save(digest)
    else
      forget(digest)
    end
  end
end
write()
return redis.status_reply('OK')
