-- Nobody waits at this replica any more: what is unsent and wanted nowhere else is forgotten.
-- ARGV[1]  replica   ARGV[2]  digests, 16 bytes each   ARGV[3]  1 if nobody waits there for anything any more
local replica, digests = ARGV[1], split(ARGV[2])
local left = false -- what others only joined
load_pairs(digests)
for _, digest in ipairs(digests) do
  local pair = records[digest]
  if pair then
    pair.interest[replica] = nil
    if pair.claim or anybody_waits(pair) then
      save(digest)
      left = left or not pair.claim
    else
      forget(digest)
    end
  end
end
write()
if left and ARGV[3] == '1' then -- whoever still waits asks for the call now
  publish('', {})
end
return redis.status_reply('OK')
