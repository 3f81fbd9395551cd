-- Record what a probe found of a replica that sends no heartbeats.
--
-- ARGV[1]  the silent replica
-- ARGV[2]  'gone':   no process, or another one, answers at its address. It leaves the membership.
--          'paused': the process answers nothing, so it calls no model.
--          'alive':  it answers, and may have lost Redis alone.
-- ARGV[3]  milliseconds for which 'paused' and 'alive' are valid
-- Reply    OK
local replica = ARGV[1]
if ARGV[2] == 'gone' then
  redis.call('ZREM', REPLICAS, replica)
  redis.call('HDEL', ADDRESSES, replica)
elseif ARGV[2] == 'alive' then
  redis.call('HDEL', PAUSED, replica)
  redis.call('HSET', ALONE, replica, now + tonumber(ARGV[3]))
else
  redis.call('HDEL', ALONE, replica)
  redis.call('HSET', PAUSED, replica, now + tonumber(ARGV[3]))
end
return redis.status_reply('OK')
