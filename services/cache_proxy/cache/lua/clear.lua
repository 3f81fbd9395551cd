-- Forget all pairs of a tag at once: a new generation begins, and `sweep` removes what the old one left behind.
go_on_when_full()
local state = load_state(KEYS[1])
if not state then
  call('UNLINK', KEYS[1]) -- garbage, or nothing
  return 0
end
local fresh = begin(KEYS[1], tonumber(state.generation, 16))
local old = call('HGET', KEYS[1], 'old') or ''
call('HSET', KEYS[1], 'old', format('%s%s,%d,0;', old, state.generation, state.buckets))
call('HDEL', KEYS[1], 'swept')
save(fresh)
return state.pairs
