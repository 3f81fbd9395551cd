-- Have pairs wait, or learn how they ended. Repeating it changes nothing: it is also the waiters' poll.
-- ARGV[1]  replica   ARGV[2]  most pairs, [3] most bytes that may be held   ARGV[4]  pairs in a batch
-- ARGV[5]  ms that a batch takes   ARGV[6]  failed calls in a row after which the model is taken for down
-- ARGV[7]  requests: msgpack list of {caller, lane, ms that the caller will wait, pairs and bytes of the request
--          that follow in further calls, token (what follows was admitted with the first new pair), polling (1:
--          admitted before), list of {digest, company, title, size}}
-- Returns  msgpack list of a reply a request, by position:
--          {'full' | 'late' | 'down', ms to wait, held pairs or bytes}: nothing was queued
--          {'ok', one byte a pair: 1-7 its level, 16 queued by this call, 17 joined, 18 failed,
--           list of the errors of those that failed}
local replica, most_pairs, most_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local batch_pairs, batch_ms, most_failures = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local requests = cmsgpack.unpack(ARGV[7])
local RESERVATION_MS = 10000

local wanted = {}
for _, request in ipairs(requests) do
  for _, item in ipairs(request[8]) do
    wanted[#wanted + 1] = item[1]
  end
end
load_pairs(wanted)
local missing = {}
for _, digest in ipairs(wanted) do
  if not records[digest] then
    missing[#missing + 1] = digest
  end
end
local outcomes = recall(missing)

-- What is held, and what waits in front of whom.
local held, held_bytes, waiting = redis.call('HLEN', PAIRS), meta('bytes'), {}
for rank, lane in ipairs(LANES) do
  waiting[rank] = redis.call('ZCARD', lane_key(lane))
end
local reserved = {} -- token -> {pairs, bytes}
local stored = redis.call('HGETALL', RESERVED)
for at = 1, #stored, 2 do
  local count, size, till = string.match(stored[at + 1], '^(%d+):(%d+):(%d+)$')
  if not count or tonumber(till) < now or tonumber(till) > now + RESERVATION_MS then
    redis.call('HDEL', RESERVED, stored[at])
  else
    reserved[stored[at]] = { tonumber(count), tonumber(size) }
    held, held_bytes = held + tonumber(count), held_bytes + tonumber(size)
  end
end
local limit = redis.call('HMGET', LIMIT, 'failures', 'not_before', 'calls_tat', 'pairs_tat')
local failures, not_before = number(limit[1]) or 0, number(limit[2]) or 0
local first_wait = math.max(0, math.max(number(limit[3]) or 0, not_before) - now)

local function refusal(lane, patience, count, size)
  if failures >= most_failures and not_before > now then
    return { 'down', not_before - now, '' } -- until then; who asks next is the probe
  end
  local ahead = 0
  for rank = 1, RANK[lane] do
    ahead = ahead + waiting[rank]
  end
  local pairs_wait = (number(limit[4]) or 0) + math.min(1, count / batch_pairs) * batch_ms - batch_ms - now
  local wait = math.max(first_wait, pairs_wait) + (math.ceil((ahead + count) / batch_pairs) - 1) * batch_ms
  if held + count > most_pairs then
    return { 'full', math.ceil(wait), held .. ' pairs' }
  elseif held_bytes + size > most_bytes then
    return { 'full', math.ceil(wait), held_bytes .. ' bytes' }
  elseif wait > patience then
    return { 'late', math.ceil(wait), '' }
  end
end

local function reserve(token, count, size)
  local before = reserved[token] or { 0, 0 }
  held, held_bytes = held + count - before[1], held_bytes + size - before[2]
  if count > 0 then
    reserved[token] = { count, size }
    redis.call('HSET', RESERVED, token, string.format('%d:%d:%d', count, size, now + RESERVATION_MS))
  elseif reserved[token] then
    reserved[token] = nil
    redis.call('HDEL', RESERVED, token)
  end
end

local claims, groups -- counted when needed
local function is_lost(pair)
  if pair.claim then
    return redis.call('HEXISTS', CLAIMS, pair.claim) == 0
  end
  claims, groups = claims or redis.call('HLEN', CLAIMS), groups or redis.call('LLEN', GROUPS)
  return not pair.suspect or claims + groups == 0
end

local function join(digest, lane, caller, until_ms, polling)
  local pair = records[digest]
  if polling and is_lost(pair) then -- part of the queue was lost: in no claim, no group, perhaps in no lane
    wait_in_lane(digest)
  end
  if not pair.claim and not pair.suspect and RANK[lane] < RANK[pair.lane] then
    place(pair.lane, digest, false)
    pair.lane, pair.caller, pair.tag = lane, caller, next_tag(lane, turn_of(lane, caller))
    wait_in_lane(digest)
  end
  if not number(pair.interest[replica]) or pair.interest[replica] < until_ms then
    pair.interest[replica] = until_ms
    save(digest)
  end
end

local function enqueue(caller, lane, patience, following, following_bytes, token, polling, asked)
  local states, errors, fresh, fresh_bytes = {}, {}, {}, 0
  for index, item in ipairs(asked) do
    local digest = item[1]
    local outcome = outcomes[digest]
    if records[digest] then
      states[index] = 17
    elseif type(outcome) == 'number' then
      states[index] = outcome
    elseif outcome then
      states[index] = 18
      errors[#errors + 1] = outcome
    else
      states[index] = 16
      fresh[#fresh + 1] = item
      fresh_bytes = fresh_bytes + item[4]
    end
  end
  if #fresh > 0 and polling ~= 1 then
    local refused = not reserved[token]
      and refusal(lane, patience, #fresh + following, fresh_bytes + following_bytes)
    if refused then
      return refused
    end
    reserve(token, following, following_bytes)
  elseif reserved[token] then
    reserve(token, following, following_bytes)
  end

  for index, item in ipairs(asked) do
    if states[index] == 17 then
      join(item[1], lane, caller, now + patience, polling == 1)
    end
  end
  local turn = #fresh > 0 and turn_of(lane, caller)
  for _, item in ipairs(fresh) do
    local digest = item[1]
    if not records[digest] then -- the same pair may be in one call twice
      records[digest] = {
        lane = lane, tag = next_tag(lane, turn), caller = caller, at = now, attempts = 0, deaths = 0, refusals = 0,
        company = item[2], title = item[3], size = item[4], interest = { [replica] = now + patience },
      }
      wait_in_lane(digest)
      bytes, held, held_bytes = bytes + item[4], held + 1, held_bytes + item[4]
      waiting[RANK[lane]] = waiting[RANK[lane]] + 1
    end
  end
  for index, state in ipairs(states) do
    states[index] = string.char(state)
  end
  return { 'ok', table.concat(states), errors }
end

local replies = {}
for index, request in ipairs(requests) do
  replies[index] = enqueue(unpack(request))
end
write()
write_ends()
return cmsgpack.pack(replies)
