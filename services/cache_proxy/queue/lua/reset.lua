-- Delete the queue of the namespace: a script failed because a key or value in Redis is not what it should
-- be.
--
-- As after a flush, the next heartbeat shows the replicas a new queue, and each enqueues again what its
-- callers wait for. The limit and the membership are deleted only where a key has a wrong type.
--
-- Reply    OK
if redis.call('TYPE', QUOTAS).ok ~= 'hash' then
  redis.call('UNLINK', QUOTAS)
end
for _, priority in ipairs(PRIORITIES) do
  for _, lane in ipairs(lanes_of(priority)) do
    redis.call('UNLINK', lane_key(lane), fair_key(lane), fair_key(account_flows(priority)))
  end
end
redis.call('UNLINK', PAIRS, SUSPECT_GROUPS, META, CLAIMS, CLAIM_PAIRS, RESERVATIONS, QUOTAS)

local types = {
  [LIMIT] = 'hash',
  [MODEL] = 'hash',
  [REPLICAS] = 'zset',
  [ADDRESSES] = 'hash',
  [PAUSED] = 'hash',
  [ALONE] = 'hash',
  [STANDBY] = 'hash',
  [QUOTA_TATS] = 'zset',
}
for key, kind in pairs(types) do
  if redis.call('TYPE', key).ok ~= kind then
    redis.call('UNLINK', key)
  end
end
for ago = 0, 1 do
  redis.call('UNLINK', outcome_key('recent', RECENT_MS, ago), outcome_key('refused', REJECTED_MS, ago),
    outcome_key('broke', RECENT_MS, ago), outcome_key('nonsense', RECENT_MS, ago))
end
return redis.status_reply('OK')
