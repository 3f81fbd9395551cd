-- Delete pairs.
--
-- ARGV[1]  digests, 16 bytes each
-- Reply    how many of them there were
local digests = ARGV[1]
local deleted = 0
allow_writes_when_full()
for at = 1, #digests, 16 do
  local b0, b1, b2, b3 = byte(digests, at, at + 3)
  local column = b0 % COLUMNS
  local tag = (b0 - column) / COLUMNS
  local state = states[tag] or load_state(tag_key(tag))
  if state then
    states[tag] = state
    local reply = try('HDEL', bucket_of(state, column, b1, b2, b3), sub(digests, at + 1, at + 11))
    if not is_error(reply) then
      deleted = deleted + reply
      state.pairs = state.pairs - reply
    elseif not is_wrong_type(reply) then
      error(reply)
    end
  end
end
for _, state in pairs(states) do
  save_state(state)
end
return deleted
