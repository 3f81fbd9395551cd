-- Let the pairs of requests wait, or return how they ended. Repeating it changes nothing: replicas also poll
-- with it.
--
-- ARGV[1]  replica
-- ARGV[2]  maximum pairs, [3] maximum bytes of texts that the queue may hold
-- ARGV[4]  pairs in a batch: used if Redis has none
-- ARGV[5]  the retry window, ms: for so long pairs are retried while the model answers nothing
-- ARGV[6]  msgpack list of requests, each a list:
--           1  caller
--           2  priority
--           3  ms that the caller will wait
--           4  pairs of the request that follow in further calls
--           5  bytes of their texts
--           6  token of the request: what follows was admitted with its first new pair
--           7  1 if it polls: it was admitted before
--           8  list of {digest, company, title, size}
--           9  context of the caller's span, or ''
--          10  the caller's quota, if there is one: {account, pairs per second, pairs that may wait} (0: any
--              number)
-- Reply    msgpack list of a reply for each request, in their order:
--          {'full' | 'late' | 'queued' | 'slow', ms to wait, pairs or bytes held}: nothing was enqueued.
--            'queued' and 'slow' are limits of the quota: pairs that wait, pairs per second
--          {'down', ms to wait, the error of the last failed call or false}: nothing was enqueued
--          {'ok', states, errors, ms}
--            states: a byte for each pair: 1-7 its level, 16 enqueued by this call, 17 joined, 18 failed
--            errors: those of the pairs that failed
--            ms: 0 if the replica should claim now, since this call changed what waits or no other replica
--                claims it; otherwise no call is possible before
local replica = ARGV[1]
local max_held_pairs = tonumber(ARGV[2])
local max_held_bytes = tonumber(ARGV[3])
local batch_pairs = deployment_batch_pairs(tonumber(ARGV[4]))
local batch_ms = slot_ms()
local window_ms = tonumber(ARGV[5])
local requests = cmsgpack.unpack(ARGV[6])
local RESERVATION_MS = 10000
local QUEUED, JOINED, FAILED = 16, 17, 18

-- Load all records, and for pairs without one how they ended.
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
local outcomes = recent_outcomes(missing)

-- Count what is held and what waits. `added` counts the pairs of this script by lane, which are not in Redis
-- yet.
load_quotas()
local held = redis.call('HLEN', PAIRS)
local held_bytes = meta_number('bytes')
local counts, added = {}, {}
local function count_of(lane)
  counts[lane] = counts[lane] or redis.call('ZCARD', lane_key(lane))
  return counts[lane] + (added[lane] or 0)
end

-- Reservations: what was admitted of requests and follows. By token {pairs, bytes}, and by account the pairs.
local reserved, reserved_of = {}, {}
local stored = redis.call('HGETALL', RESERVATIONS)
for at = 1, #stored, 2 do
  local count, size, until_ms, suffix = string.match(stored[at + 1], '^(%d+):(%d+):(%d+)(.*)$')
  if not count or tonumber(until_ms) < now or tonumber(until_ms) > now + RESERVATION_MS then
    redis.call('HDEL', RESERVATIONS, stored[at])
  else
    local account = string.match(suffix, '^:(.*)$')
    reserved[stored[at]] = { tonumber(count), tonumber(size) }
    if account then
      reserved_of[account] = (reserved_of[account] or 0) + tonumber(count)
    end
    held = held + tonumber(count)
    held_bytes = held_bytes + tonumber(size)
  end
end

-- When the next call is possible. An arrival time that no call can have caused (by another clock, for
-- instance) is replaced by the next claim; but a replica whose requests are rejected never claims.
local limit = redis.call('HMGET', LIMIT, 'not_before', 'calls_tat', 'pairs_tat')
local failures, backoff_until = model.backoff()
local not_before = math.max(to_not_before(limit[1]), backoff_until)
local outage = redis.call('HMGET', META, 'down', 'failing_at', 'reason')
local is_outage_over = model.outage_is_over(to_number(outage[2]) or 0, backoff_until, window_ms)
local is_down = outage[1] == '1' and not is_outage_over
local function bounded_tat(tat)
  return math.min(to_number(tat) or 0, now + batch_ms + MAX_LATE_MS)
end
local first_wait_ms = math.max(0, math.max(bounded_tat(limit[2]), not_before) - now)

-- Return how many of the pairs that wait in a lane its quota lets go within some time.
local function sendable_in_lane(lane, within_ms)
  local count = count_of(lane)
  local account = account_of(lane)
  return account and math.min(count, sendable_pairs(account, rates[account] or 0, now + within_ms)) or count
end

local function sendable_in_priority(priority, within_ms)
  local sum = 0
  for _, lane in ipairs(lanes_of(priority)) do
    sum = sum + sendable_in_lane(lane, within_ms)
  end
  return sum
end

-- Return in how many calls, at the latest, the first `ahead` pairs of a priority are sent. Bulk has its tenth
-- of each call, and what interactive leaves.
local function calls_until(priority, ahead, within_ms)
  local bulk_part = batch_pairs > 1 and math.ceil(batch_pairs / BULK_DIVISOR) or 0
  if priority == 'interactive' then
    local kept = bulk_part > 0 and sendable_in_priority('bulk', within_ms) > 0 and bulk_part or 0
    return math.ceil(ahead / (batch_pairs - kept))
  end
  local interactive = sendable_in_priority('interactive', within_ms)
  if priority == 'bulk' then
    local behind = math.ceil((interactive + ahead) / batch_pairs)
    return bulk_part > 0 and math.min(behind, math.ceil(ahead / bulk_part)) or behind
  end
  return math.ceil((interactive + sendable_in_priority('bulk', within_ms) + ahead) / batch_pairs)
end

-- Return the ms until the last of some calls, if `count` pairs wait for the first one.
local function wait_for_calls(count, calls)
  local pairs_wait_ms = bounded_tat(limit[3]) + math.min(1, count / batch_pairs) * batch_ms - batch_ms - now
  return math.max(first_wait_ms, pairs_wait_ms) + (math.max(1, calls) - 1) * batch_ms
end

-- Return how long it takes until the pairs up to a position in a lane are sent, with `more` pairs of this
-- script that wait there too: by the limit, and by the quota. What is later than `within_ms` is too late
-- anyway.
local function waits_at(lane, tag, more, within_ms)
  local priority = priority_of(lane)
  local account = account_of(lane)
  local rate, quota_wait_ms = rates[account] or 0, 0

  -- If even all pairs that are held are sent in time, the position matters for the quota alone.
  local min_batch = batch_pairs - (batch_pairs > 1 and math.ceil(batch_pairs / BULK_DIVISOR) or 0)
  local longest_ms = wait_for_calls(math.max(1, more), math.ceil((held + more) / min_batch))
  if longest_ms <= within_ms and rate == 0 then
    return longest_ms, 0
  end
  local ahead = redis.call('ZCOUNT', lane_key(lane), '-inf', tag) + more
  if account then
    if rate > 0 then
      local tat, burst_ms = quota_tat(account, rate)
      local before = priority == 'bulk' and count_of(lane_of('interactive', account)) or 0
      quota_wait_ms = math.max(0, math.max(tat, now) + (before + ahead) * 1000 / rate - burst_ms - now)
    end
    if longest_ms <= within_ms then
      return longest_ms, quota_wait_ms
    end
    -- From the position among the account's pairs to that among all pairs of the priority.
    tag = account_start_tag(priority, account) + ahead - 1
    ahead = ahead + redis.call('ZCOUNT', lane_key(priority), '-inf', tag)
  end
  for _, other in ipairs(accounts) do
    if other ~= account and priority ~= 'refresh' then
      local before = math.floor(tag - account_start_tag(priority, other)) + 1
      local sendable = sendable_in_lane(lane_of(priority, other), within_ms)
      ahead = ahead + math.max(0, math.min(before, sendable))
    end
  end
  return wait_for_calls(math.max(1, more), calls_until(priority, ahead, within_ms)), quota_wait_ms
end

-- Return the shortest wait of a pair, over all its positions.
local function wait_of_pair(pair, within_ms)
  local shortest_ms = math.huge
  each_position(pair, function(lane, tag)
    shortest_ms = math.min(shortest_ms, math.max(waits_at(lane, tag, 0, within_ms)))
  end)
  return shortest_ms
end

-- Return the reply that rejects a request, or nil.
--   own_pairs       pairs that would wait in the caller's own flow: new ones, and those joined that go last
--   count, size     new pairs and their bytes, which would be held
--   joined_wait_ms  the longest wait of the other pairs that were joined
local function rejection(caller, lane, patience_ms, own_pairs, count, size, joined_wait_ms, quota)
  -- While the model is down, the first request after the backoff is the probe. No caller waits for a call
  -- that comes after its deadline.
  local waits_for_probe = count > 0 and is_down and (backoff_until > now or held > 0)
  local is_too_late = failures > 0 and backoff_until - now > patience_ms
  if waits_for_probe or is_too_late and count + own_pairs + joined_wait_ms > 0 then
    return { 'down', math.max(0, backoff_until - now), unpack_safely(outage[3]) or false }
  end
  local wait_ms, quota_wait_ms = joined_wait_ms, 0
  if own_pairs > 0 then
    local last_tag = start_tag(lane, flow_of(lane, caller)) + own_pairs - 1
    local own_wait_ms
    own_wait_ms, quota_wait_ms = waits_at(lane, last_tag, (added[lane] or 0) + own_pairs, patience_ms)
    wait_ms = math.max(wait_ms, own_wait_ms)
  end
  if count > 0 and quota and quota.space < count then
    local until_space_ms = quota.rate > 0 and (count - quota.space) * 1000 / quota.rate or 0
    return { 'queued', math.ceil(math.max(wait_ms, until_space_ms)), tostring(quota.waiting) }
  elseif count > 0 and held + count > max_held_pairs then
    return { 'full', math.ceil(wait_ms), held .. ' pairs' }
  elseif count > 0 and held_bytes + size > max_held_bytes then
    return { 'full', math.ceil(wait_ms), held_bytes .. ' bytes' }
  elseif quota_wait_ms > math.max(wait_ms, patience_ms) then
    return { 'slow', math.ceil(quota_wait_ms), '' }
  elseif wait_ms > patience_ms then
    return { 'late', math.ceil(wait_ms), '' }
  end
end

-- Set what is reserved for the rest of a request.
local function reserve(token, count, size, account)
  local before = reserved[token] or { 0, 0 }
  held = held + count - before[1]
  held_bytes = held_bytes + size - before[2]
  if account then
    reserved_of[account] = (reserved_of[account] or 0) + count - before[1]
  end
  if count > 0 then
    reserved[token] = { count, size }
    local suffix = account and ':' .. account or ''
    local value = string.format('%d:%d:%d', count, size, now + RESERVATION_MS) .. suffix
    redis.call('HSET', RESERVATIONS, token, value)
  elseif reserved[token] then
    reserved[token] = nil
    redis.call('HDEL', RESERVATIONS, token)
  end
end

-- Return whether a part of the queue was lost: the pair is in no claim and no group, and perhaps in no lane.
local claims, groups
local function is_lost(pair)
  if pair.claim then
    return redis.call('HEXISTS', CLAIMS, pair.claim) == 0
  end
  claims = claims or redis.call('HLEN', CLAIMS)
  groups = groups or redis.call('LLEN', SUSPECT_GROUPS)
  return not pair.suspect or claims + groups == 0
end

-- An account has pairs here, at this rate. The rate of the last request counts.
local function set_rate(account, rate)
  if not rates[account] then
    accounts[#accounts + 1] = account
  end
  rates[account] = rate
end

-- Return what changes for a pair that waits when a request joins it: 'move' it from a lane of the same
-- account with a lower priority, 'add' a position, or nil. It gets a position if none that it has is as good
-- and free of quotas: it is sent with the first turn and quota that come, and no caller waits for the quota
-- of another. Also return the lane to move from.
local function better_position(pair, priority, account)
  -- The best rank of a position without a quota, and the position in the account's lanes.
  local free_rank, same_lane, positions = nil, nil, 0
  each_position(pair, function(lane)
    local other = account_of(lane)
    positions = positions + 1
    if other == account then
      same_lane = lane
    end
    if not other or (rates[other] or 0) == 0 then
      free_rank = math.min(free_rank or #PRIORITIES, rank_of(lane))
    end
  end)
  if same_lane then
    return PRIORITY_RANK[priority] < rank_of(same_lane) and 'move' or nil, same_lane
  elseif positions < MAX_POSITIONS and not (free_rank and free_rank <= PRIORITY_RANK[priority]) then
    return 'add'
  end
end

local function step_of(pair, priority, account)
  if pair.claim or pair.suspect then
    return nil
  end
  return better_position(pair, priority, account)
end

-- Whether a request has changed what waits, and so perhaps when the next call is possible.
local is_changed
local function set_position(pair, lane, tag, caller, instead_of)
  if pair.lane == instead_of then
    pair.lane = lane
    pair.caller = caller
    pair.tag = tag
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

local function add_position(digest, lane, caller, instead_of)
  local tag = take_start_tag(lane, flow_of(lane, caller))
  is_changed = true
  if instead_of then
    set_lane_tag(instead_of, digest, false)
  end
  set_position(records[digest], lane, tag, caller, instead_of)
  added[lane] = (added[lane] or 0) + 1
  put_in_lanes(digest)
end

-- Return whether another replica with heartbeats waits for a pair, and so will claim it.
local is_alive = {}
local function others_wait(pair)
  for other, deadline in pairs(pair.interest) do
    if other ~= replica and type(deadline) == 'number' and deadline > now then
      if is_alive[other] == nil then
        is_alive[other] = now - (to_number(redis.call('ZSCORE', REPLICAS, other)) or 0) <= SILENT_MS
      end
      if is_alive[other] then
        return true
      end
    end
  end
  return false
end

-- Join a pair that waits or is in-flight. `space` is how many positions the quota's bound on waiting pairs
-- still allows; return what is left of it. `promised` has the lanes in which pairs that are in-flight or
-- suspect will wait if they wait again (see `return_pairs`).
local promised = {}
local function join(digest, priority, account, caller, until_ms, is_polling, space, context)
  local pair = records[digest]
  if is_polling and is_lost(pair) then
    is_changed = true
    put_in_lanes(digest)
  end
  is_changed = is_changed or not pair.claim and not others_wait(pair)

  -- The caller's quota is another than it was.
  local had = priority_of(pair.lane)
  if is_polling and pair.caller == caller and had ~= 'refresh' and account_of(pair.lane) ~= account
    and not pair.claim and not pair.suspect then
    add_position(digest, lane_of(had, account), caller, pair.lane)
  end

  local lane = lane_of(priority, account)
  local step, same_lane = better_position(pair, priority, account)
  local changes = step == 'move' or step == 'add' and space > 0
  if changes and (pair.claim or pair.suspect) then
    set_position(pair, lane, virtual_time(lane), caller, same_lane)
    promised[lane] = true
    mark_changed(digest)
  elseif changes then
    add_position(digest, lane, caller, same_lane)
  end
  if changes and step == 'add' then
    space = space - 1
  end
  if not to_number(pair.interest[replica]) or pair.interest[replica] < until_ms then
    pair.interest[replica] = until_ms
    mark_changed(digest)
  end
  if add_context(pair, context) then
    mark_changed(digest)
  end
  return space
end

-- Return, of the pairs that a request would join, how many would wait in the caller's own flow, and the
-- longest wait of the others.
local function joined_waits(digests, priority, account, patience_ms, space)
  -- Lane -> the last tag in it, of pairs that wait in no other lane.
  local last_tags = {}
  local own_pairs, wait_ms = 0, 0
  for _, digest in ipairs(digests) do
    local pair = records[digest]
    local step = step_of(pair, priority, account)
    if step == 'add' and space > 0 then
      space = space - 1
      own_pairs = own_pairs + (wait_of_pair(pair, patience_ms) > patience_ms and 1 or 0)
    elseif step == 'move' then
      own_pairs = own_pairs + 1
    elseif not pair.claim and not pair.suspect then
      if pair.also then
        wait_ms = math.max(wait_ms, wait_of_pair(pair, patience_ms))
      else
        last_tags[pair.lane] = math.max(last_tags[pair.lane] or pair.tag, pair.tag)
      end
    end
  end
  for lane, tag in pairs(last_tags) do
    wait_ms = math.max(wait_ms, waits_at(lane, tag, 0, patience_ms))
  end
  return own_pairs, wait_ms
end

-- Enqueue the pairs of one request, and return its reply.
local function enqueue(
  caller, priority, patience_ms, following, following_bytes, token, polling, items, context, quota)
  local states, errors, new_items, new_bytes, joined = {}, {}, {}, 0, {}
  local account = quota and quota[1]
  local lane = lane_of(priority, account)
  if account then
    set_rate(account, quota[2])
  end

  -- Sort the pairs: they wait already, have ended recently, or are new.
  for index, item in ipairs(items) do
    local digest = item[1]
    local outcome = outcomes[digest]
    if records[digest] then
      states[index] = JOINED
      joined[#joined + 1] = digest
    elseif type(outcome) == 'number' then
      states[index] = outcome
    elseif outcome then
      states[index] = FAILED
      errors[#errors + 1] = outcome
    else
      states[index] = QUEUED
      new_items[#new_items + 1] = item
      new_bytes = new_bytes + item[4]
    end
  end

  -- Admit the request as a whole, with what follows in further calls.
  local count = #new_items > 0 and #new_items + following or 0
  local quota_state, space = nil, math.huge
  if account and quota[3] > 0 then
    local waiting = reserved_of[account] or 0
    for _, of_caller in ipairs(CALLER_PRIORITIES) do
      waiting = waiting + count_of(lane_of(of_caller, account))
    end
    quota_state = { space = quota[3] - waiting, waiting = waiting, rate = quota[2] }
    space = quota_state.space - (reserved[token] and 0 or count)
  end
  if polling ~= 1 and not reserved[token] then
    local own_pairs, joined_wait_ms = joined_waits(joined, priority, account, patience_ms, space)
    local size = new_bytes + following_bytes
    local rejected =
      rejection(caller, lane, patience_ms, count + own_pairs, count, size, joined_wait_ms, quota_state)
    if rejected then
      return rejected
    end
  end
  if #new_items > 0 and polling ~= 1 or reserved[token] then
    reserve(token, following, following_bytes, account)
  end

  -- While calls fail, each replica claims: the way of another one to the model may be what is broken, and a
  -- replica whose calls failed waits a little longer than the others.
  is_changed = #new_items > 0 or failures > 0 or redis.call('HEXISTS', META, 'failing_since') == 1
  for _, digest in ipairs(joined) do
    space = join(digest, priority, account, caller, now + patience_ms, polling == 1, space, context)
  end
  local flow = #new_items > 0 and flow_of(lane, caller)
  for _, item in ipairs(new_items) do
    local digest = item[1]
    -- The same pair may be in one call twice.
    if not records[digest] then
      records[digest] = {
        lane = lane,
        tag = take_start_tag(lane, flow),
        caller = caller,
        at = now,
        attempts = 0,
        deaths = 0,
        refusals = 0,
        company = item[2],
        title = item[3],
        size = item[4],
        interest = { [replica] = now + patience_ms },
        request = polling ~= 1 and token or nil,
      }
      add_context(records[digest], context)
      put_in_lanes(digest)
      bytes_delta = bytes_delta + item[4]
      held = held + 1
      held_bytes = held_bytes + item[4]
      added[lane] = (added[lane] or 0) + 1
    end
  end
  if account and (added[lane] or promised[lane] or polling == 1) then
    redis.call('HSET', QUOTAS, account, string.format('%.17g:%d', quota[2], now))
  end
  for index, state in ipairs(states) do
    states[index] = string.char(state)
  end
  local claim_after_ms = is_changed and 0 or math.max(1, math.ceil(wait_for_calls(held, 1)))
  return { 'ok', table.concat(states), errors, claim_after_ms }
end

local replies = {}
for index, request in ipairs(requests) do
  replies[index] = enqueue(unpack(request))
end
write_changes()
write_finish_tags()
return cmsgpack.pack(replies)
