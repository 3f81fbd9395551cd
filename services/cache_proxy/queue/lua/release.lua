-- Undo a claim whose batch was not sent.
-- ARGV[1]  the claim's id
-- The slot is given back only while the limit still is what this claim made it.
local claim = load_claim(ARGV[1])
for account, until_when in pairs(claim and claim.spent or {}) do -- of a quota likewise
  if number(redis.call('ZSCORE', SPENT, account)) == number(until_when[2]) then
    redis.call('ZADD', SPENT, string.format('%.17g', until_when[1]), account)
  end
end
local function unpaid(_, pair)
  pair.paid = pair.paid ~= ARGV[1] and pair.paid or nil
  return true
end
if claim and give_back(ARGV[1], claim, unpaid) then
  publish('', {})
end
write()
model.free_slot(ARGV[1])
return redis.status_reply('OK')
