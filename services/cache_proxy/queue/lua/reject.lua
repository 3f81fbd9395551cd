-- The model refused the batch for a pair.
-- ARGV[1]  the claim's id   ARGV[2]  the error, packed   ARGV[3]  msgpack list of {digest, error} of the pairs that
--          it named; if it named none, one of them is bad, and they are suspects
-- ARGV[4]  refused batches that a pair may have been in before it is taken for the bad one   ARGV[5]  replica
local claim, named = load_claim(ARGV[1]), {}
if not claim then
  return redis.status_reply('OK')
end
for _, item in ipairs(cmsgpack.unpack(ARGV[3])) do
  named[item[1]] = item[2]
end
model.answered(ARGV[5])
convict(ARGV[1], claim, unpack_safely(ARGV[2]), named, tonumber(ARGV[4]), 'refused', REFUSED_MS)
return redis.status_reply('OK')
