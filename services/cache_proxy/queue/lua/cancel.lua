-- Remove the interest of a replica in pairs: no caller waits there for them any longer. A pair that is not
-- sent and that no other replica waits for is removed.
--
-- ARGV[1]  replica
-- ARGV[2]  digests, 16 bytes each
-- ARGV[3]  1 if the replica waits for no pair at all any longer
-- Reply    OK
local replica = ARGV[1]
local digests = split_digests(ARGV[2])
local others_wait = false

load_pairs(digests)
for _, digest in ipairs(digests) do
  local pair = records[digest]
  if pair then
    pair.interest[replica] = nil
    if pair.claim or has_waiters(pair) then
      mark_changed(digest)
      others_wait = others_wait or not pair.claim
    else
      remove_pair(digest)
    end
  end
end
write_changes()

-- This replica will not claim these pairs, so the replicas that only joined them have to.
if others_wait and ARGV[3] == '1' then
  publish('', {})
end
return redis.status_reply('OK')
