-- Try each command that the proxy sends to Redis by itself or in a script, on keys that nothing else uses.
--
-- KEYS[1]  what these keys begin with
-- ARGV[1]  a channel without subscribers; empty: try no channel
-- Reply    {command, error} for each that failed, whatever the reason
local failed = {}

local function try(name, ...)
  local reply = redis.pcall(name, ...)
  if type(reply) == 'table' and reply.err then
    failed[#failed + 1] = { name, reply.err }
  end
end

local hash, sorted, list = KEYS[1] .. ':hash', KEYS[1] .. ':sorted', KEYS[1] .. ':list'
try('UNLINK', hash, sorted, list)
try('DEL', KEYS[1] .. ':none')
try('HSET', hash, 'field', 1)
try('HSETNX', hash, 'field', 1)
try('HINCRBY', hash, 'field', 1)
try('HGET', hash, 'field')
try('HMGET', hash, 'field')
try('HGETALL', hash)
try('HKEYS', hash)
try('HLEN', hash)
try('HEXISTS', hash, 'field')
try('HDEL', hash, 'other')
try('TYPE', hash)
try('EXISTS', hash)
try('PEXPIRE', hash, 1000)
try('ZADD', sorted, 1, 'member')
try('ZCARD', sorted)
try('ZCOUNT', sorted, 0, 1)
try('ZSCORE', sorted, 'member')
try('ZRANGE', sorted, 0, 0)
try('ZRANGEBYSCORE', sorted, 0, 1)
try('ZREM', sorted, 'other')
try('ZREMRANGEBYSCORE', sorted, 2, 3)
try('LPUSH', list, 1)
try('RPUSH', list, 2)
try('LINDEX', list, 0)
try('LRANGE', list, 0, 1)
try('LLEN', list)
try('LTRIM', list, 0, 0)
try('RPOP', list)
try('TIME')
try('INFO', 'server')
if ARGV[1] ~= '' then
  try('PUBLISH', ARGV[1], '')
  try('PUBSUB', 'NUMSUB', ARGV[1])
end
redis.pcall('UNLINK', hash, sorted, list)
return failed
