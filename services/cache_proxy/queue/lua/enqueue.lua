-- Have pairs wait, or learn how they ended. Repeating it changes nothing: it is also the waiters' poll.
-- ARGV[1]  replica   ARGV[2]  most pairs, [3] most bytes that may be held
-- ARGV[4]  pairs in a batch, if the deployment's were lost
-- ARGV[5]  failed calls in a row after which the model is taken for down
-- ARGV[6]  requests: msgpack list of {caller, lane, ms that the caller will wait, pairs and bytes of the request
--          that follow in further calls, token (what follows was admitted with the first new pair), polling (1:
--          admitted before), list of {digest, company, title, size}, context of the caller's span or ''}
-- Returns  msgpack list of a reply a request, by position:
--          {'full' | 'late' | 'down', ms to wait, held pairs or bytes}: nothing was queued
--          {'ok', one byte a pair: 1-7 its level, 16 queued by this call, 17 joined, 18 failed,
--           list of the errors of those that failed}
local replica, most_pairs, most_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local batch_pairs, batch_ms, most_failures = pairs_in_batch(tonumber(ARGV[4])), slot_ms(), tonumber(ARGV[5])
local requests = cmsgpack.unpack(ARGV[6])
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
local failures, not_before = number(limit[1]) or 0, not_before_of(limit[2])
-- What no call can have spent (by another clock, say) the next claim puts right; but who is refused never claims.
local function spent_until(tat)
  return math.min(number(tat) or 0, now + batch_ms + LATE_MS)
end
local first_wait = math.max(0, math.max(spent_until(limit[3]), not_before) - now)

-- In how many calls at the latest the pairs up to a place in a lane go out, with `more` of this script's own that
-- wait there too: bulk has its tenth of each, and what interactive leaves.
local function calls_until(lane, tag, more)
  local ahead = redis.call('ZCOUNT', lane_key(lane), '-inf', tag) + more
  if lane == 'interactive' then
    local left = waiting[2] > 0 and batch_pairs > 1 and batch_pairs - math.ceil(batch_pairs / BULK_SHARE) or batch_pairs
    return math.ceil(ahead / left)
  elseif lane == 'bulk' then
    local tenth = batch_pairs > 1 and math.ceil(batch_pairs / BULK_SHARE) or 0
    local behind = math.ceil((waiting[1] + ahead) / batch_pairs)
    return tenth > 0 and math.min(behind, math.ceil(ahead / tenth)) or behind
  end
  return math.ceil((waiting[1] + waiting[2] + ahead) / batch_pairs)
end

local added = { 0, 0, 0 } -- by this script, so not yet in the lanes
local function wait_of(count, calls)
  local pairs_wait = spent_until(limit[4]) + math.min(1, count / batch_pairs) * batch_ms - batch_ms - now
  return math.max(first_wait, pairs_wait) + (math.max(1, calls) - 1) * batch_ms
end

-- Of `turn` pairs that would wait in the caller's own turn, of which `count` are new and would be held, and of the
-- last place that a joined pair has in each lane.
local function refusal(caller, lane, patience, turn, count, size, joined)
  if count > 0 and failures >= most_failures and not_before > now then
    return { 'down', not_before - now, '' } -- until then; who asks next is the probe
  end
  local wait = 0
  if turn > 0 then
    local last = first_tag(lane, turn_of(lane, caller)) + turn - 1
    wait = wait_of(turn, calls_until(lane, last, added[RANK[lane]] + turn))
  end
  for other, tag in pairs(joined) do
    wait = math.max(wait, wait_of(1, calls_until(other, tag, 0)))
  end
  if count > 0 and held + count > most_pairs then
    return { 'full', math.ceil(wait), held .. ' pairs' }
  elseif count > 0 and held_bytes + size > most_bytes then
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

local function join(digest, lane, caller, until_ms, polling, context)
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
  if add_context(pair, context) then
    save(digest)
  end
end

local function enqueue(caller, lane, patience, following, following_bytes, token, polling, asked, context)
  local states, errors, fresh, fresh_bytes, promoted, joined = {}, {}, {}, 0, 0, {}
  for index, item in ipairs(asked) do
    local digest = item[1]
    local outcome = outcomes[digest]
    local pair = records[digest]
    if pair then
      states[index] = 17
      if not pair.claim and not pair.suspect then
        if RANK[lane] < RANK[pair.lane] then
          promoted = promoted + 1
        else
          joined[pair.lane] = math.max(joined[pair.lane] or pair.tag, pair.tag)
        end
      end
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
  if polling ~= 1 and not reserved[token] then
    local count = #fresh > 0 and #fresh + following or 0
    local refused = refusal(caller, lane, patience, count + promoted, count, fresh_bytes + following_bytes, joined)
    if refused then
      return refused
    end
  end
  if #fresh > 0 and polling ~= 1 then
    reserve(token, following, following_bytes)
  elseif reserved[token] then
    reserve(token, following, following_bytes)
  end

  for index, item in ipairs(asked) do
    if states[index] == 17 then
      join(item[1], lane, caller, now + patience, polling == 1, context)
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
      add_context(records[digest], context)
      wait_in_lane(digest)
      bytes, held, held_bytes = bytes + item[4], held + 1, held_bytes + item[4]
      waiting[RANK[lane]], added[RANK[lane]] = waiting[RANK[lane]] + 1, added[RANK[lane]] + 1
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
