-- Have pairs wait, or learn how they ended. Repeating it changes nothing: it is also the waiters' poll.
-- ARGV[1]  replica   ARGV[2]  most pairs, [3] most bytes that may be held
-- ARGV[4]  pairs in a batch, if the deployment's were lost
-- ARGV[5]  ms for which pairs are retried while the model answers nothing
-- ARGV[6]  requests: msgpack list of {caller, lane, ms that the caller will wait, pairs and bytes of the request
--          that follow in further calls, token (the request's name; what follows was admitted with the first new pair), polling (1:
--          admitted before), list of {digest, company, title, size}, context of the caller's span or '', and, if
--          there is one, the caller's quota: {account, pairs a second, pairs that may wait} (0: any number)}
-- Returns  msgpack list of a reply a request, by position:
--          {'full' | 'late' | 'queued' | 'slow', ms to wait, held pairs or bytes}: nothing was queued; the
--          last two are the quota's: pairs that may wait, pairs a second
--          {'down', ms to wait, the error of the last failed call or false}: nothing was queued
--          {'ok', one byte a pair: 1-7 its level, 16 queued by this call, 17 joined, 18 failed,
--           list of the errors of those that failed, ms after which a call is for the replica to see to: 0 if this
--           changed what waits, or if nobody else sees to it; else no call is possible before}
local replica, most_pairs, most_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local batch_pairs, batch_ms, window = pairs_in_batch(tonumber(ARGV[4])), slot_ms(), tonumber(ARGV[5])
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
load_quotas()
local held, held_bytes = redis.call('HLEN', PAIRS), meta('bytes')
local counts, added = {}, {} -- lane -> pairs that wait there, and those of this script, which are not yet in Redis
local function count_of(lane)
  counts[lane] = counts[lane] or redis.call('ZCARD', lane_key(lane))
  return counts[lane] + (added[lane] or 0)
end
local reserved, reserved_of = {}, {} -- token -> {pairs, bytes, account}; account -> pairs
local stored = redis.call('HGETALL', RESERVED)
for at = 1, #stored, 2 do
  local count, size, till, rest = string.match(stored[at + 1], '^(%d+):(%d+):(%d+)(.*)$')
  if not count or tonumber(till) < now or tonumber(till) > now + RESERVATION_MS then
    redis.call('HDEL', RESERVED, stored[at])
  else
    local account = string.match(rest, '^:(.*)$')
    reserved[stored[at]] = { tonumber(count), tonumber(size) }
    if account then
      reserved_of[account] = (reserved_of[account] or 0) + tonumber(count)
    end
    held, held_bytes = held + tonumber(count), held_bytes + tonumber(size)
  end
end
local limit = redis.call('HMGET', LIMIT, 'not_before', 'calls_tat', 'pairs_tat')
local failures, backoff_until = model.backoff()
local not_before = math.max(not_before_of(limit[1]), backoff_until)
local outage = redis.call('HMGET', META, 'down', 'failing_at', 'reason')
local is_down = outage[1] == '1' and not model.is_over(number(outage[2]) or 0, backoff_until, window)
-- What no call can have spent (by another clock, say) the next claim puts right; but who is refused never claims.
local function spent_until(tat)
  return math.min(number(tat) or 0, now + batch_ms + LATE_MS)
end
local first_wait = math.max(0, math.max(spent_until(limit[2]), not_before) - now)

-- How many of the pairs that wait in a lane may go within so many ms, as the quota has it.
local function may_go(lane, within)
  local count, account = count_of(lane), account_of(lane)
  return account and math.min(count, may_send(account, rates[account] or 0, now + within)) or count
end

local function all_that_may_go(priority, within)
  local sum = 0
  for _, lane in ipairs(lanes_of(priority)) do
    sum = sum + may_go(lane, within)
  end
  return sum
end

-- In how many calls at the latest the first so many pairs of a priority go out: bulk has its tenth of each, and what
-- interactive leaves.
local function calls_until(priority, ahead, within)
  local interactive = priority ~= 'interactive' and all_that_may_go('interactive', within)
  if priority == 'interactive' then
    local kept = batch_pairs > 1 and all_that_may_go('bulk', within) > 0 and math.ceil(batch_pairs / BULK_SHARE) or 0
    return math.ceil(ahead / (batch_pairs - kept))
  elseif priority == 'bulk' then
    local tenth = batch_pairs > 1 and math.ceil(batch_pairs / BULK_SHARE) or 0
    local behind = math.ceil((interactive + ahead) / batch_pairs)
    return tenth > 0 and math.min(behind, math.ceil(ahead / tenth)) or behind
  end
  return math.ceil((interactive + all_that_may_go('bulk', within) + ahead) / batch_pairs)
end

local function wait_of(count, calls)
  local pairs_wait = spent_until(limit[3]) + math.min(1, count / batch_pairs) * batch_ms - batch_ms - now
  return math.max(first_wait, pairs_wait) + (math.max(1, calls) - 1) * batch_ms
end

-- How long until the pairs up to a place in a lane are out, with `more` of this script's own that wait there too, as
-- the limit has it and as the quota has it; `within`: what is later than that is too late anyway.
local function waits_at(lane, tag, more, within)
  local priority, account = priority_of(lane), account_of(lane)
  local rate, quota_wait = rates[account] or 0, 0
  -- If even all that is held goes out in time, nobody's place needs to be known but for the quota.
  local least_left = batch_pairs - (batch_pairs > 1 and math.ceil(batch_pairs / BULK_SHARE) or 0)
  local at_most = wait_of(math.max(1, more), math.ceil((held + more) / least_left))
  if at_most <= within and rate == 0 then
    return at_most, 0
  end
  local ahead = redis.call('ZCOUNT', lane_key(lane), '-inf', tag) + more
  if account then
    if rate > 0 then
      local spent, burst = quota_of(account, rate)
      local first = priority == 'bulk' and count_of(lane_of('interactive', account)) or 0
      quota_wait = math.max(0, math.max(spent, now) + (first + ahead) * 1000 / rate - burst - now)
    end
    if at_most <= within then
      return at_most, quota_wait
    end
    tag = account_tag(priority, account) + ahead - 1
    ahead = ahead + redis.call('ZCOUNT', lane_key(priority), '-inf', tag)
  end
  for _, other in ipairs(accounts) do
    if other ~= account and priority ~= 'refresh' then
      local before = math.floor(tag - account_tag(priority, other)) + 1
      ahead = ahead + math.max(0, math.min(before, may_go(lane_of(priority, other), within)))
    end
  end
  return wait_of(math.max(1, more), calls_until(priority, ahead, within)), quota_wait
end

-- The shortest wait of a pair's, of all its places.
local function wait_where_it_is(pair, within)
  local least = math.huge
  each_place(pair, function(lane, tag)
    least = math.min(least, math.max(waits_at(lane, tag, 0, within)))
  end)
  return least
end

-- Of `turn` pairs that would wait in the caller's own turn, of which `count` are new and would be held, and of those
-- joined that go out last.
local function refusal(caller, lane, patience, turn, count, size, joined_wait, quota)
  -- While the model is down, whoever asks next when a call is due is the probe. Nobody waits for a call that comes
  -- after his deadline.
  if count > 0 and is_down and (backoff_until > now or held > 0)
    or failures > 0 and backoff_until - now > patience and count + turn + joined_wait > 0 then
    return { 'down', math.max(0, backoff_until - now), unpack_safely(outage[3]) or false }
  end
  local wait, quota_wait = joined_wait, 0
  if turn > 0 then
    local last = first_tag(lane, turn_of(lane, caller)) + turn - 1
    local own_wait
    own_wait, quota_wait = waits_at(lane, last, (added[lane] or 0) + turn, patience)
    wait = math.max(wait, own_wait)
  end
  if count > 0 and quota and quota.room < count then
    local until_room = quota.rate > 0 and (count - quota.room) * 1000 / quota.rate or 0
    return { 'queued', math.ceil(math.max(wait, until_room)), tostring(quota.waiting) }
  elseif count > 0 and held + count > most_pairs then
    return { 'full', math.ceil(wait), held .. ' pairs' }
  elseif count > 0 and held_bytes + size > most_bytes then
    return { 'full', math.ceil(wait), held_bytes .. ' bytes' }
  elseif quota_wait > math.max(wait, patience) then
    return { 'slow', math.ceil(quota_wait), '' }
  elseif wait > patience then
    return { 'late', math.ceil(wait), '' }
  end
end

local function reserve(token, count, size, account)
  local before = reserved[token] or { 0, 0 }
  held, held_bytes = held + count - before[1], held_bytes + size - before[2]
  if account then
    reserved_of[account] = (reserved_of[account] or 0) + count - before[1]
  end
  if count > 0 then
    reserved[token] = { count, size }
    redis.call('HSET', RESERVED, token,
      string.format('%d:%d:%d', count, size, now + RESERVATION_MS) .. (account and ':' .. account or ''))
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

-- An account has pairs here, at this rate: the last word counts.
local function know(account, rate)
  if not rates[account] then
    accounts[#accounts + 1] = account
  end
  rates[account] = rate
end

-- What becomes of a pair that waits when somebody joins it. Who is in the same lane with a worse priority moves; if
-- no place of the pair's is as good and free of quotas, it gets one more: it goes out with whichever turn and quota
-- comes first, and no caller waits for another's.
local function better_place(pair, priority, account)
  local free, same, places = nil, nil, 0 -- the best rank of a place without a quota; the place in the account's lanes
  each_place(pair, function(lane)
    local other = account_of(lane)
    places = places + 1
    if other == account then
      same = lane
    end
    if not other or (rates[other] or 0) == 0 then
      free = math.min(free or #LANES, rank_of(lane))
    end
  end)
  if same then
    return RANK[priority] < rank_of(same) and 'move' or nil, same
  elseif places < MAX_PLACES and not (free and free <= RANK[priority]) then
    return 'add'
  end
end

local function step_of(pair, priority, account)
  if pair.claim or pair.suspect then
    return nil
  end
  return better_place(pair, priority, account)
end

local stirred -- whether a request has changed what waits, and so perhaps when the next call is due
local function set_place(pair, lane, tag, caller, instead_of)
  if pair.lane == instead_of then
    pair.lane, pair.caller, pair.tag = lane, caller, tag
    if pair.also then
      pair.also[lane] = nil
    end
  else
    pair.also = pair.also or {}
    if instead_of then
      pair.also[instead_of] = nil
    end
    pair.also[lane] = { tag, caller }
  end
end

local function put(digest, lane, caller, instead_of)
  local tag = next_tag(lane, turn_of(lane, caller))
  stirred = true
  if instead_of then
    place(instead_of, digest, false)
  end
  set_place(records[digest], lane, tag, caller, instead_of)
  added[lane] = (added[lane] or 0) + 1
  wait_in_lane(digest)
end

-- Whether a replica that is heard of waits for a pair too, and so sees to its call.
local heard = {}
local function others_wait(pair)
  for other, deadline in pairs(pair.interest) do
    if other ~= replica and type(deadline) == 'number' and deadline > now then
      if heard[other] == nil then
        heard[other] = now - (number(redis.call('ZSCORE', REPLICAS, other)) or 0) <= SILENT_MS
      end
      if heard[other] then
        return true
      end
    end
  end
  return false
end

local promised = {} -- lanes in which pairs in flight or suspect wait if they do so again
local function join(digest, priority, account, caller, until_ms, polling, room, context)
  local pair = records[digest]
  if polling and is_lost(pair) then -- part of the queue was lost: in no claim, no group, perhaps in no lane
    stirred = true
    wait_in_lane(digest)
  end
  stirred = stirred or not pair.claim and not others_wait(pair)
  local had = priority_of(pair.lane)
  if polling and pair.caller == caller and had ~= 'refresh' and account_of(pair.lane) ~= account
    and not pair.claim and not pair.suspect then -- the caller's quota is another than it was
    put(digest, lane_of(had, account), caller, pair.lane)
  end
  local lane, step, same = lane_of(priority, account), better_place(pair, priority, account)
  local changes = step == 'move' or step == 'add' and room > 0
  if changes and (pair.claim or pair.suspect) then -- it waits there once it waits again: see give_back
    set_place(pair, lane, virtual(lane), caller, same)
    promised[lane] = true
    save(digest)
  elseif changes then
    put(digest, lane, caller, same)
  end
  if changes and step == 'add' then
    room = room - 1
  end
  if not number(pair.interest[replica]) or pair.interest[replica] < until_ms then
    pair.interest[replica] = until_ms
    save(digest)
  end
  if add_context(pair, context) then
    save(digest)
  end
  return room
end

-- Of the pairs joined: how many would wait in the caller's own turn, and the longest wait of the others.
local function joining(digests, priority, account, patience, room)
  local turn, wait, last = 0, 0, {} -- last: lane -> the last place in it, of pairs that wait in no other
  for _, digest in ipairs(digests) do
    local pair = records[digest]
    local step = step_of(pair, priority, account)
    if step == 'add' and room > 0 then
      room = room - 1
      turn = turn + (wait_where_it_is(pair, patience) > patience and 1 or 0)
    elseif step == 'move' then
      turn = turn + 1
    elseif not pair.claim and not pair.suspect then
      if pair.also then
        wait = math.max(wait, wait_where_it_is(pair, patience))
      else
        last[pair.lane] = math.max(last[pair.lane] or pair.tag, pair.tag)
      end
    end
  end
  for lane, tag in pairs(last) do
    wait = math.max(wait, waits_at(lane, tag, 0, patience))
  end
  return turn, wait
end

local function enqueue(
  caller, priority, patience, following, following_bytes, token, polling, asked, context, quota)
  local states, errors, fresh, fresh_bytes, joined = {}, {}, {}, 0, {}
  local account, limits, room = quota and quota[1], nil, math.huge
  local lane = lane_of(priority, account)
  if account then
    know(account, quota[2])
  end
  for index, item in ipairs(asked) do
    local digest = item[1]
    local outcome = outcomes[digest]
    if records[digest] then
      states[index] = 17
      joined[#joined + 1] = digest
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
  local count = #fresh > 0 and #fresh + following or 0
  if account and quota[3] > 0 then
    local there = reserved_of[account] or 0
    for _, asked_for in ipairs(ASKED) do
      there = there + count_of(lane_of(asked_for, account))
    end
    limits = { room = quota[3] - there, waiting = there, rate = quota[2] }
    room = limits.room - (reserved[token] and 0 or count)
  end
  if polling ~= 1 and not reserved[token] then
    local turn, joined_wait = joining(joined, priority, account, patience, room)
    local refused =
      refusal(caller, lane, patience, count + turn, count, fresh_bytes + following_bytes, joined_wait, limits)
    if refused then
      return refused
    end
  end
  if #fresh > 0 and polling ~= 1 then
    reserve(token, following, following_bytes, account)
  elseif reserved[token] then
    reserve(token, following, following_bytes, account)
  end

  stirred = #fresh > 0 or failures > 0 or redis.call('HEXISTS', META, 'failing_since') == 1 -- whose calls fail waits a little longer than others
  for _, digest in ipairs(joined) do
    room = join(digest, priority, account, caller, now + patience, polling == 1, room, context)
  end
  local turn = #fresh > 0 and turn_of(lane, caller)
  for _, item in ipairs(fresh) do
    local digest = item[1]
    if not records[digest] then -- the same pair may be in one call twice
      records[digest] = {
        lane = lane, tag = next_tag(lane, turn), caller = caller, at = now, attempts = 0, deaths = 0, refusals = 0,
        company = item[2], title = item[3], size = item[4], interest = { [replica] = now + patience },
        request = polling ~= 1 and token or nil,
      }
      add_context(records[digest], context)
      wait_in_lane(digest)
      bytes, held, held_bytes = bytes + item[4], held + 1, held_bytes + item[4]
      added[lane] = (added[lane] or 0) + 1
    end
  end
  if account and (added[lane] or promised[lane] or polling == 1) then
    redis.call('HSET', QUOTAS, account, string.format('%.17g:%d', quota[2], now))
  end
  for index, state in ipairs(states) do
    states[index] = string.char(state)
  end
  return { 'ok', table.concat(states), errors, stirred and 0 or math.max(1, math.ceil(wait_of(held, 1))) }
end

local replies = {}
for index, request in ipairs(requests) do
  replies[index] = enqueue(unpack(request))
end
write()
write_ends()
return cmsgpack.pack(replies)
