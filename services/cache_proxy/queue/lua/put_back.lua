-- Undo a claim whose batch was not sent.
-- ARGV[1]  the claim's id
-- The slot is given back only while the limit still is what this claim made it.
local claim = load_claim(ARGV[1])
if claim and give_back(ARGV[1], claim) then
  publish('', {})
end
write()
local limit = redis.call('HMGET', LIMIT, 'last', 'pairs_before', 'calls_before')
if limit[1] == ARGV[1] then
  if limit[2] and limit[3] then
    redis.call('HSET', LIMIT, 'pairs_tat', limit[2], 'calls_tat', limit[3])
  end
  redis.call('HDEL', LIMIT, 'last')
end
return redis.status_reply('OK')
