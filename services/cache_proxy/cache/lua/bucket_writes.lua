-- What scripts that write share: a state that can change, and buckets that split.
local CHUNK = 2000 -- arguments of one call: Lua's stack is not endless
local states = {}

-- With memory full, Redis refuses what may need some until a script has written anything; but what frees it must
-- go on.
local function go_on_when_full()
  call('UNLINK', KEYS[1] .. 'nothing')
end

-- A generation is a name that no earlier one of the tag has: the minute it began, in hex.
local function begin(key, after)
  local minute = floor((now - DAY_0) / 60)
  return { key = key, generation = format('%x', math.max(minute, (after or -1) + 1)), buckets = COLUMNS, pairs = 0 }
end

local function save(state)
  call('HSET', state.key, 'generation', state.generation, 'buckets', state.buckets, 'pairs', math.max(0, state.pairs))
end

-- The state of a tag, made if there is none: what stood there instead is dropped.
local function state_of(tag)
  local state = states[tag]
  if not state then
    local key = tag_key(tag)
    state = load_state(key)
    if not state then
      if call('EXISTS', key) == 1 then -- else not: after any write, Redis would let the rest pass even if it is full
        call('UNLINK', key)
      end
      state = begin(key)
      state.prefix = key .. state.generation .. ':'
    end
    states[tag] = state
  end
  return state
end

local function bucket_of(state, column, b1, b2, b3)
  local first, scale = column_of(state.buckets, column)
  return state.prefix .. format('%x', bucket_number(b1, b2, b3, first, scale) * COLUMNS + column)
end

-- A write that heals: a bucket of a wrong type is garbage, and dropped. Whatever else is wrong is an error.
local function write(bucket, ...)
  local reply = try('HSET', bucket, ...)
  if type(reply) == 'number' then
    return reply
  end
  if is_wrong_type(reply) then
    garbage = garbage + 1
    call('UNLINK', bucket)
    reply = try('HSET', bucket, ...)
  end
  if is_error(reply) then
    error(reply)
  end
  return reply
end

local function fields_of(bucket)
  local stored = try('HGETALL', bucket)
  if is_wrong_type(stored) then
    garbage = garbage + 1
    call('UNLINK', bucket)
    return {}
  end
  return stored
end

-- Take the next bucket in turn and spread its pairs over two new ones.
local sound = {} -- value -> whether it is one: there are few different ones
local function split(state)
  local column, number = state.buckets % COLUMNS, floor(state.buckets / COLUMNS)
  local from = state.prefix .. format('%x', number * COLUMNS + column)
  local stored, left, right = fields_of(from), {}, {}
  state.buckets = state.buckets + 1
  local first, scale = column_of(state.buckets, column)
  for at = 1, #stored, 2 do
    local field, value = stored[at], stored[at + 1]
    if sound[value] == nil then
      sound[value] = unpack_value(value) ~= nil
    end
    if #field == 11 and sound[value] then
      local b1, b2, b3 = byte(field, 1, 3)
      local into = bucket_number(b1, b2, b3, first, scale) % 2 == 0 and left or right
      into[#into + 1] = field
      into[#into + 1] = value
    else
      garbage = garbage + 1
      state.pairs = state.pairs - (#field == 11 and 1 or 0) -- what no `put` wrote, none has counted
    end
  end
  for side, fields in pairs({ [0] = left, [1] = right }) do
    local bucket = state.prefix .. format('%x', (number * 2 + side) * COLUMNS + column)
    for at = 1, #fields, CHUNK do
      write(bucket, unpack(fields, at, math.min(at + CHUNK - 1, #fields)))
    end
  end
  call('UNLINK', from)
end
