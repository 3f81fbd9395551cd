-- The model rejected the batch of a claim because of one of its pairs.
--
-- ARGV[1]  id of the claim
-- ARGV[2]  the error, packed
-- ARGV[3]  msgpack list of {digest, error} of the pairs that the model named. If it named none, one of the
--          pairs is bad, and all of them become suspects
-- ARGV[4]  rejected batches that a pair may have been in before it is taken for the bad one
-- ARGV[5]  replica
-- Reply    OK
local claim = load_claim(ARGV[1])
local errors = {}
if not claim then
  return redis.status_reply('OK')
end
for _, item in ipairs(cmsgpack.unpack(ARGV[3])) do
  errors[item[1]] = item[2]
end
model.record_answer(ARGV[5])
end_or_suspect(ARGV[1], claim, unpack_safely(ARGV[2]), errors, tonumber(ARGV[4]), 'refused', REJECTED_MS)
return redis.status_reply('OK')
