-- Undo a claim whose batch was not sent: its pairs wait at the front again.
--
-- ARGV[1]  id of the claim
-- Reply    OK
local id = ARGV[1]
local claim = load_claim(id)

-- Return what the claim consumed of quotas, unless another claim consumed more since.
for account, tats in pairs(claim and claim.spent or {}) do
  if to_number(redis.call('ZSCORE', QUOTA_TATS, account)) == to_number(tats[2]) then
    redis.call('ZADD', QUOTA_TATS, string.format('%.17g', tats[1]), account)
  end
end

local function mark_unpaid(_, pair)
  pair.paid = pair.paid ~= id and pair.paid or nil
  return true
end
if claim and return_pairs(id, claim, mark_unpaid) then
  publish('', {})
end
write_changes()

-- The slot is returned under the same condition.
model.free_slot(id)
return redis.status_reply('OK')
