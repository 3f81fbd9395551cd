-- Delete all pairs of a tag at once: a new generation begins, and `sweep` deletes the buckets of the old one.
--
-- KEYS[1]  the state of the tag
-- Reply    how many pairs there were
allow_writes_when_full()
local state = load_state(KEYS[1])
if not state then
  -- It is garbage, or nothing.
  call('UNLINK', KEYS[1])
  return 0
end
local new_state = new_generation(KEYS[1], tonumber(state.generation, 16))
local old = call('HGET', KEYS[1], 'old') or ''
call('HSET', KEYS[1], 'old', format('%s%s,%d,0;', old, state.generation, state.buckets))
call('HDEL', KEYS[1], 'swept')
save_state(new_state)
return state.pairs
