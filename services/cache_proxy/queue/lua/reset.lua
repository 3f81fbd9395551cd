-- A script could not work with what it found in Redis: some key or number is not what it should be. The queue is
-- made anew, as after a flush: the heartbeat shows a new queue, and whoever waits asks again.
if redis.call('TYPE', QUOTAS).ok ~= 'hash' then
  redis.call('UNLINK', QUOTAS)
end
for _, priority in ipairs(LANES) do
  for _, lane in ipairs(lanes_of(priority)) do
    redis.call('UNLINK', lane_key(lane), fair_key(lane), fair_key(turns_of(priority)))
  end
end
redis.call('UNLINK', PAIRS, GROUPS, META, CLAIMS, CLAIMED, RESERVED, QUOTAS)
for key, kind in pairs({ [LIMIT] = 'hash', [MODEL] = 'hash', [REPLICAS] = 'zset', [ADDRESSES] = 'hash', [PAUSED] = 'hash',
  [ALONE] = 'hash', [SPENT] = 'zset', [STANDBY] = 'hash' }) do
  if redis.call('TYPE', key).ok ~= kind then
    redis.call('UNLINK', key)
  end
end
for ago = 0, 1 do
  redis.call('UNLINK', recent_key('recent', RECENT_MS, ago), recent_key('refused', REFUSED_MS, ago),
    recent_key('broke', RECENT_MS, ago), recent_key('nonsense', RECENT_MS, ago))
end
return redis.status_reply('OK')
