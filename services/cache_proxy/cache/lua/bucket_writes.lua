-- Functions that scripts of the cache share if they write: states that change, and buckets that split.

-- Arguments of one command: Lua's stack is limited.
local CHUNK_ARGUMENTS = 2000
-- Tag -> its state, as this script changes it.
local states = {}

-- With memory full, Redis rejects commands that may need some until a script has written anything. A script
-- that frees memory must go on.
local function allow_writes_when_full()
  call('UNLINK', KEYS[1] .. 'nothing')
end

-- Return the state of a new generation. Its name is the minute in which it begins, in hexadecimal, and no
-- earlier generation of the tag has it.
local function new_generation(key, after)
  local minute = floor((now - DAY_0) / 60)
  local number = math.max(minute, (after or -1) + 1)
  return { key = key, generation = format('%x', number), buckets = COLUMNS, pairs = 0 }
end

local function save_state(state)
  local count = math.max(0, state.pairs)
  call('HSET', state.key, 'generation', state.generation, 'buckets', state.buckets, 'pairs', count)
end

-- Return the state of a tag, and make one if there is none. Garbage in its place is deleted, but only if
-- something is there: after any write, Redis would let the rest pass even if it is full.
local function state_of(tag)
  local state = states[tag]
  if not state then
    local key = tag_key(tag)
    state = load_state(key)
    if not state then
      if call('EXISTS', key) == 1 then
        call('UNLINK', key)
      end
      state = new_generation(key)
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

-- Set fields of a bucket. Return how many are new. A key of a wrong type is garbage and is deleted first; any
-- other reply is an error.
local function set_fields(bucket, ...)
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

-- Split the next bucket in turn: its pairs go to two new ones. A field that no `put` wrote was not counted.
-- `is_valid` is by value, since there are few different ones.
local is_valid = {}
local function split_bucket(state)
  local column = state.buckets % COLUMNS
  local number = floor(state.buckets / COLUMNS)
  local from = state.prefix .. format('%x', number * COLUMNS + column)
  local stored, left, right = fields_of(from), {}, {}
  state.buckets = state.buckets + 1
  local first, scale = column_of(state.buckets, column)
  for at = 1, #stored, 2 do
    local field = stored[at]
    local value = stored[at + 1]
    if is_valid[value] == nil then
      is_valid[value] = unpack_value(value) ~= nil
    end
    if #field == FIELD_BYTES and is_valid[value] then
      local b1, b2, b3 = byte(field, 1, 3)
      local into = bucket_number(b1, b2, b3, first, scale) % 2 == 0 and left or right
      into[#into + 1] = field
      into[#into + 1] = value
    else
      garbage = garbage + 1
      state.pairs = state.pairs - (#field == FIELD_BYTES and 1 or 0)
    end
  end
  for side, fields in pairs({ [0] = left, [1] = right }) do
    local bucket = state.prefix .. format('%x', (number * 2 + side) * COLUMNS + column)
    for at = 1, #fields, CHUNK_ARGUMENTS do
      set_fields(bucket, unpack(fields, at, math.min(at + CHUNK_ARGUMENTS - 1, #fields)))
    end
  end
  call('UNLINK', from)
end
