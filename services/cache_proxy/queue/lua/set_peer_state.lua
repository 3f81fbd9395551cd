-- What became of a replica that is not heard of, as somebody found who knocked at its door.
-- ARGV[1]  that replica   ARGV[2]  'gone': no process; 'paused': one that answers nothing, and so calls nobody;
--          'alive': one that does, and may have lost Redis alone
-- ARGV[3]  ms for which 'paused' and 'alive' may be relied on
if ARGV[2] == 'gone' then
  redis.call('ZREM', REPLICAS, ARGV[1])
  redis.call('HDEL', ADDRESSES, ARGV[1])
elseif ARGV[2] == 'alive' then
  redis.call('HDEL', PAUSED, ARGV[1])
  redis.call('HSET', ALONE, ARGV[1], now + tonumber(ARGV[3]))
else
  redis.call('HDEL', ALONE, ARGV[1])
  redis.call('HSET', PAUSED, ARGV[1], now + tonumber(ARGV[3]))
end
return redis.status_reply('OK')
