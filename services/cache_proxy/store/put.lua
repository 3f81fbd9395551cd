-- Remember a batch of levels.
-- KEYS[1]  the namespace's base key, as in get.lua
-- ARGV[1]  17 bytes an answer: the digest, then the level as one byte
-- ARGV[2]  unix seconds of day 0
-- A value is day * 8 + level, a small integer that a listpack keeps in three bytes.
-- A bucket of a wrong type is garbage: it is dropped, and the write heals it.
local base, answers = KEYS[1], ARGV[1]
local day = math.floor((tonumber(redis.call('TIME')[1]) - tonumber(ARGV[2])) / 86400)
for at = 1, #answers, 17 do
  local first, second, third = string.byte(answers, at, at + 2)
  local bucket = string.format('%s%05x', base, first * 1024 + second * 4 + third % 4)
  local field, value = string.sub(answers, at + 4, at + 15), day * 8 + string.byte(answers, at + 16)
  local reply = redis.pcall('HSET', bucket, field, value)
  if type(reply) == 'table' and reply.err then
    if not string.find(reply.err, 'WRONGTYPE', 1, true) then
      return reply
    end
    redis.call('UNLINK', bucket)
    redis.call('HSET', bucket, field, value)
  end
end
return redis.status_reply('OK')
