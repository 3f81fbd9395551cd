-- Claim the next batch and its slot, if a call is allowed now.
--
-- ARGV[1]   replica
-- ARGV[2]   id of the claim, chosen by the replica: repeated, it returns the same batch
-- ARGV[3]   pairs per second, [4] calls per second (0: no limit), [5] maximum pairs in a batch: used if Redis
--           has none
-- ARGV[6]   maximum bytes in a batch
-- ARGV[7]   linger, ms
-- ARGV[8]   lease, ms
-- ARGV[9]   how long before its slot a full batch may be claimed, ms
-- ARGV[10]  run id of the server that the last heartbeat of the replica reached
-- ARGV[11]  ms since the replica's own last call failed; -1 if it was answered, or failed too long ago
-- Reply     {'wait', ms; -1 if nothing waits}
--           {'aside', ms}: the calls of another replica are answered, and those of this one are not
--           {'batch', ms until it may be sent, ms until its slot,
--            msgpack list of {digest, company, title, ms waited},
--            contexts of the spans of callers that wait for the pairs, at most MAX_LINKS,
--            the request that enqueued all of them, '' if there were several}
local replica = ARGV[1]
local id = ARGV[2]
local batch_bytes = tonumber(ARGV[6])
local linger_ms = tonumber(ARGV[7])
local lease_ms = tonumber(ARGV[8])
local ahead_ms = tonumber(ARGV[9])
local failed_ms_ago = tonumber(ARGV[11])
own_limits = {
  pairs_per_second = tonumber(ARGV[3]),
  calls_per_second = tonumber(ARGV[4]),
  batch_pairs = tonumber(ARGV[5]),
}
local pairs_rate, calls_rate
do
  local settings = redis.call('HMGET', LIMIT, 'pairs_per_second', 'calls_per_second')
  pairs_rate = to_rate(settings[1]) or own_limits.pairs_per_second
  calls_rate = to_rate(settings[2]) or own_limits.calls_per_second
end
local batch_pairs = deployment_batch_pairs(own_limits.batch_pairs)
-- The way from here to the model takes LEAD_MS, which is the slot of a batch that could be sent at once, and
-- one millisecond more for each PAIRS_PER_MS pairs.
local LEAD_MS, PAIRS_PER_MS = 15, 50
local HEARTBEAT_MS, TAKEOVER_QUIET_MS = 300, 1200
-- At most every fourth call is a probe of suspects while other pairs wait.
local CALLS_BETWEEN_PROBES = 3
-- Pairs that only quotas hold back are sent together, as many as the quotas allow in GATHER_MS.
local GATHER_MS = 50

local function batch_reply(claim)
  local batch, contexts, known_contexts, request = {}, {}, {}, nil
  for _, digest in ipairs(claim.digests) do
    local pair = records[digest]
    if pair and pair.claim == id then
      batch[#batch + 1] = { digest, pair.company, pair.title, claim.at - pair.at }
      local enqueued_by = type(pair.request) == 'string' and pair.request or ''
      request = (request or enqueued_by) == enqueued_by and enqueued_by or ''
      for _, context in ipairs(pair.trace and #contexts < MAX_LINKS and contexts_of(pair) or {}) do
        if not known_contexts[context] then
          known_contexts[context] = true
          contexts[#contexts + 1] = context
        end
      end
    end
  end
  local until_send_ms = math.ceil(claim.send_at - now)
  local until_slot_ms = math.ceil(claim.slot_at - now)
  return { 'batch', until_send_ms, until_slot_ms, cmsgpack.pack(batch), contexts, request or '' }
end

-- The script is repeated when its reply was lost.
do
  local known_claim = load_claim(id)
  if known_claim then
    load_pairs(known_claim.digests)
    return batch_reply(known_claim)
  end
end

-- A replica numbers its claims. If a later one was granted, this script was delayed on its way, and the
-- replica no longer waits for its reply: what it would claim would be lost until the claim is reaped. A
-- serial number that is much higher was not given by this replica.
do
  local MAX_DELAYED_CLAIMS = 10000
  local function serial_of(name)
    return type(name) == 'string' and to_number(string.match(name, '%.(%d+)$')) or nil
  end
  local granted = serial_of(redis.pcall('HGET', BASE .. 'granted:' .. replica, 'id'))
  local serial = serial_of(id)
  if granted and serial and serial <= granted and granted - serial < MAX_DELAYED_CLAIMS then
    return { 'wait', 1 }
  end
end
reap()

-- The limit: two theoretical arrival times (GCRA). If they are absent, impossible or those of another server
-- (after a restart, or a failover that may have lost the last write), the limit counts as fully used now.
local function interval_ms(per_second, cost)
  return per_second > 0 and cost * 1000 / per_second or 0
end
local run_id = server_run_id()
-- What the replica may just have sent by its own time slots is not recorded here before its heartbeat (see
-- heartbeat.lua).
if ARGV[10] ~= run_id then
  return { 'wait', HEARTBEAT_MS / 2 }
end
local pairs_tat, calls_tat, not_before
-- While calls fail, one small call at a time finds out whether the model works again.
local is_failing, max_pairs = false, batch_pairs
do
  local limit = redis.call('HMGET', LIMIT, 'run', 'pairs_tat', 'calls_tat', 'not_before')
  pairs_tat = to_number(limit[2])
  calls_tat = to_number(limit[3])
  not_before = to_not_before(limit[4])
  local failures, backoff_until, is_breaking = model.backoff()
  not_before = math.max(not_before, backoff_until)
  if failures > 0 and not is_breaking then
    is_failing = true
    max_pairs = math.min(model.PROBE_PAIRS, batch_pairs)
  end

  local burst_ms = math.max(interval_ms(pairs_rate, batch_pairs), interval_ms(calls_rate, 1))
  local latest_tat = now + burst_ms + ahead_ms + LEAD_MS + batch_pairs / PAIRS_PER_MS + MAX_LATE_MS
  local is_known = limit[1] == run_id and pairs_tat and calls_tat
  if not is_known or pairs_tat > latest_tat or calls_tat > latest_tat then
    pairs_tat = now + burst_ms
    calls_tat = now + burst_ms
    if limit[1] and limit[1] ~= run_id and burst_ms > 0 then
      -- The server before this one may still serve other replicas: during a planned failover there are two
      -- masters for about a second. This one is quiet until the replicas of each side take those of the other
      -- side for silent, and keep to their own time slots.
      not_before = math.max(not_before, now + TAKEOVER_QUIET_MS)
      redis.call('HSET', LIMIT, 'not_before', not_before)
    end
    redis.call('HSET', LIMIT, 'run', run_id, 'pairs_tat', pairs_tat, 'calls_tat', calls_tat)
    -- What was consumed before is not returned.
    redis.call('HDEL', LIMIT, 'last')
    assume_quotas_spent()
  end
end

-- Replicas that may have lost Redis have their share of every quota, as they have time slots of their own.
load_quotas()
local silent, members, is_silent = silent_replicas(replica), {}, {}
if #silent > 0 then
  for _, name in ipairs(silent) do
    is_silent[name] = true
  end
  local connected = 0
  for member in string.gmatch(redis.call('HGET', LIMIT, 'members') or '', '[^,]+') do
    members[#members + 1] = member
    connected = connected + (is_silent[member] and 0 or 1)
  end
  for _, account in ipairs(accounts) do
    rates[account] = rates[account] * math.max(1, connected) / math.max(1, #members)
  end
end

-- Count what may be sent now, by lane, and find the oldest pair of it. The interactive pairs of an account go
-- first.
local waiting, oldest_at, held_until = 0, nil, nil
local counts, offered = {}, {}
local function offer(lane, max_count)
  local count = redis.call('ZCARD', lane_key(lane))
  counts[lane] = count
  local first = count > 0 and redis.call('ZRANGE', lane_key(lane), 0, 0) or {}
  load_pairs(first)
  local pair = records[first[1]]
  offered[lane] = math.min(count, math.max(max_count, pair and pair.paid and 1 or 0))
  waiting = waiting + offered[lane]
  if pair and offered[lane] > 0 and (not oldest_at or pair.at < oldest_at) then
    oldest_at = math.min(now, pair.at)
  end
  return count
end
for _, priority in ipairs(PRIORITIES) do
  offer(priority, math.huge)
end
for _, account in ipairs(accounts) do
  local rate, count = rates[account], 0
  local left = sendable_pairs(account, rate, now + LEAD_MS)
  for _, priority in ipairs(CALLER_PRIORITIES) do
    local lane_count = offer(lane_of(priority, account), left)
    left = math.max(0, left - lane_count)
    count = count + lane_count
  end
  if count > 0 and rate > 0 then
    local tat, quota_burst = quota_tat(account, rate)
    local next_at = tat + 1000 / rate - quota_burst - LEAD_MS
    held_until = math.min(held_until or next_at, next_at)
  end
end
local groups = redis.call('LLEN', SUSPECT_GROUPS)
if waiting == 0 and groups == 0 then
  return { 'wait', held_until and math.ceil(math.max(GATHER_MS, held_until - now)) or -1 }
end

-- A replica whose own calls fail leaves the slots to replicas whose calls are answered, and publishes that
-- pairs wait.
local RETRY_MS = 200
if failed_ms_ago >= 0 then
  local answered = redis.call('HMGET', META, 'answered_by', 'answered_at')
  if answered[1] and answered[1] ~= replica and (to_number(answered[2]) or 0) > now - failed_ms_ago
    and now - (to_number(redis.call('ZSCORE', REPLICAS, answered[1])) or 0) <= SILENT_MS then
    publish('', {})
    return { 'aside', RETRY_MS }
  end
end
if is_failing and redis.call('HEXISTS', CLAIMS, redis.call('HGET', MODEL, 'probe') or '') == 1 then
  return { 'wait', RETRY_MS }
end

-- Whether the batch is a probe of suspects, and when it may be sent: a batch that is not full waits for the
-- linger time, unless it is a probe.
local is_probe = groups > 0 and (waiting == 0 or meta_number('since_probe') >= CALLS_BETWEEN_PROBES)
local group = {}
if is_probe then
  local packed = unpack_safely(redis.call('LINDEX', SUSPECT_GROUPS, -1))
  group = packed and type(packed[1]) == 'string' and split_digests(packed[1]) or {}
end
local count = math.min(max_pairs, is_probe and #group or waiting)
local wait_ms
do
  local linger_until = now
  if not is_probe and not is_failing and waiting < batch_pairs and oldest_at then
    linger_until = oldest_at + linger_ms
  end
  local calls_wait_ms = calls_rate > 0 and calls_tat - now or 0
  local pairs_wait_ms = 0
  if pairs_rate > 0 then
    pairs_wait_ms = pairs_tat + interval_ms(pairs_rate, count) - interval_ms(pairs_rate, batch_pairs) - now
  end
  wait_ms = math.max(0, linger_until - now, not_before - now, calls_wait_ms, pairs_wait_ms)
  local early_ms = waiting >= batch_pairs and not is_failing and ahead_ms or LEAD_MS
  if wait_ms > early_ms or linger_until > now then
    return { 'wait', math.ceil(math.max(linger_until - now, wait_ms - early_ms, 1)) }
  end
end

-- A replica that may have lost Redis calls the model in time slots of its own. Then all replicas keep to time
-- slots. Members have them in turn, in blocks of about a second. Those of silent members are left free, and
-- so is the last one of each block if they are close together (see time_slots.py).
local time_slot = time_slot_ms()
if #silent > 0 and time_slot > 0 then
  local slots_per_turn = math.ceil(1000 / time_slot)
  local slot_index = math.floor((now + LEAD_MS) / time_slot)
  local owner = members[math.floor(slot_index / slots_per_turn) % math.max(1, #members) + 1]
  local is_guard_slot = slots_per_turn > 2 and slot_index % slots_per_turn == slots_per_turn - 1
  if (owner and is_silent[owner]) or is_guard_slot or math.abs(slot_index * time_slot - now) > LEAD_MS then
    return { 'wait', math.max(1, (slot_index + 1) * time_slot - now) }
  end
end

-- The batch may be sent from `send_at` on. It is claimed a little before, so that a busy Redis costs no slot.
local chosen, size, visited = {}, 0, 0
local claim = {
  replica = replica,
  lease_until = now + wait_ms + lease_ms,
  at = now,
  send_at = now + wait_ms,
  slot_at = now + math.max(wait_ms, LEAD_MS + count / PAIRS_PER_MS),
}
local function is_wanted(digest)
  local pair = records[digest]
  if pair and not has_waiters(pair) then
    remove_pair(digest)
    return false
  end
  return pair ~= false
end

-- Add a pair if it fits. A pair that is larger than a batch is sent alone, unless `is_strict`.
local function add(digest, max_bytes, is_strict)
  local pair_bytes = records[digest].size
  if (#chosen > 0 or is_strict) and size + pair_bytes > max_bytes then
    return false
  end
  size = size + pair_bytes
  chosen[#chosen + 1] = digest
  return true
end

local rest
-- Account -> pairs for which its quota is charged.
local charged = {}
if is_probe then
  -- Probe one half of a group of suspects. It is split between callers where possible, so that the pairs of
  -- one caller do not wait because of another's.
  redis.call('RPOP', SUSPECT_GROUPS)
  load_pairs(group)
  local alive = {}
  for _, digest in ipairs(group) do
    if records[digest] and records[digest].suspect and is_wanted(digest) then
      alive[#alive + 1] = digest
    end
  end
  local function caller_at(at)
    return records[alive[at]].caller
  end
  table.sort(alive, function(one, other)
    if records[one].caller ~= records[other].caller then
      return records[one].caller < records[other].caller
    end
    return one < other
  end)
  local function is_boundary(at)
    return at == #alive or caller_at(at) ~= caller_at(at + 1)
  end
  local half = math.ceil(#alive / 2)
  local below, above = half, half
  while below > 0 and not is_boundary(below) do
    below = below - 1
  end
  while above < #alive and not is_boundary(above) do
    above = above + 1
  end
  if below > 0 and (above == #alive or half - below <= above - half) then
    half = below
  elseif above < #alive then
    half = above
  end
  rest = {}
  local is_full = false
  for at, digest in ipairs(alive) do
    is_full = is_full or at > half or #chosen == max_pairs or not add(digest, batch_bytes)
    if is_full then
      rest[#rest + 1] = digest
    end
  end
else
  -- Choose pairs from the lanes. A stream is what a lane may send now, in its order, and `tag` is the
  -- position of its first pair among all pairs of the priority. A pair may be in several lanes, so it is
  -- taken once.
  local is_taken = {}

  -- Move a stream to its next pair that is wanted. Return whether there is one.
  local function advance(stream, space)
    while true do
      stream.at = stream.at + 1
      if stream.at > #stream.found then
        if visited >= MAX_PAIRS_PER_SCRIPT + batch_pairs then
          return false
        end
        local max_found = stream.account and 2 * #stream.found + 16 or CHUNK_ARGUMENTS
        local last = stream.from + math.min(CHUNK_ARGUMENTS, space, max_found) - 1
        stream.found = redis.call('ZRANGE', lane_key(stream.lane), stream.from, last)
        stream.from = stream.from + #stream.found
        stream.at = 1
        if #stream.found == 0 then
          return false
        end
        load_pairs(stream.found)
      end
      visited = visited + 1
      local digest = stream.found[stream.at]
      local pair = records[digest]
      local tag = pair and not pair.claim and not pair.suspect and tag_in_lane(pair, stream.lane)
      if not tag then
        -- It does not belong here.
        set_lane_tag(stream.lane, digest, false)
      elseif not is_taken[digest] and is_wanted(digest) then
        if stream.account and not pair.paid and stream.left < 1 then
          return false
        end
        stream.digest = digest
        stream.own_tag = tag
        stream.tag = stream.account and account_start_tag(stream.priority, stream.account) or tag
        return true
      end
    end
  end

  -- Priority -> its streams, as a binary heap by tag.
  local heaps = {}
  local function sift_down(heap)
    local at = 1
    while true do
      local smallest = at
      for child = 2 * at, math.min(2 * at + 1, #heap) do
        smallest = heap[child].tag < heap[smallest].tag and child or smallest
      end
      if smallest == at then
        return
      end
      heap[at], heap[smallest] = heap[smallest], heap[at]
      at = smallest
    end
  end
  local function heap_of(priority, space)
    if not heaps[priority] then
      local heap = {}
      for _, lane in ipairs(lanes_of(priority)) do
        local stream = {
          lane = lane,
          priority = priority,
          account = account_of(lane),
          left = offered[lane],
          from = 0,
          at = 0,
          found = {},
        }
        if offered[lane] > 0 and advance(stream, space) then
          heap[#heap + 1] = stream
        end
      end
      table.sort(heap, function(one, other)
        return one.tag < other.tag
      end)
      heaps[priority] = heap
    end
    return heaps[priority]
  end

  -- Charge a pair of an account, and let the account's next pair start behind those of the others.
  local function charge(priority, stream, digest)
    virtual_times[stream.lane] = math.max(virtual_time(stream.lane), stream.own_tag)
    advance_account(priority, stream.account, stream.tag)
    if not records[digest].paid and rates[stream.account] > 0 then
      stream.left = stream.left - 1
      records[digest].paid = id
      charged[stream.account] = (charged[stream.account] or 0) + 1
    end
  end

  local function fill(priority, max_count, max_bytes, is_strict)
    if max_count < 1 then
      return
    end
    local space, heap = max_count, heap_of(priority, max_count)
    while space > 0 and #heap > 0 do
      local stream = heap[1]
      local digest = stream.digest
      -- Another stream may have taken it meanwhile.
      if not is_taken[digest] and records[digest] then
        if not add(digest, max_bytes, is_strict) then
          return
        end
        is_taken[digest] = true
        space = space - 1
        virtual_times[priority] = math.max(virtual_time(priority), stream.tag)
        if stream.account then
          charge(priority, stream, digest)
        end
      end
      if not advance(stream, math.max(space, 1)) then
        heap[1] = heap[#heap]
        heap[#heap] = nil
      end
      sift_down(heap)
    end
  end

  -- Bulk has its tenth, then each priority what is left. No pair leaves its lane before all are chosen, so
  -- positions in the lanes stay valid.
  if max_pairs > 1 then
    fill('bulk', math.ceil(max_pairs / BULK_DIVISOR), math.floor(batch_bytes / BULK_DIVISOR), true)
  end
  for _, priority in ipairs(PRIORITIES) do
    fill(priority, max_pairs - #chosen, batch_bytes)
  end
end
for _, digest in ipairs(chosen) do
  local pair = records[digest]
  if not pair.suspect then
    remove_from_lanes(digest)
  end
  pair.claim = id
  pair.suspect = nil
  mark_changed(digest)
end
write_changes()
write_finish_tags()

-- Write virtual times. The tags of a lane that is empty now begin at 0 again, and in a lane with very many
-- callers those are removed that have nothing ahead of the virtual time.
do
  local function reset_tags(lane, flows)
    redis.call('DEL', fair_key(flows))
    redis.call('HDEL', META, 'virtual:' .. lane)
  end
  for _, priority in ipairs(PRIORITIES) do
    local lanes, has_pairs = lanes_of(priority), false
    for _, lane in ipairs(lanes) do
      local exists = counts[lane] > 0 and redis.call('EXISTS', lane_key(lane)) == 1
      has_pairs = has_pairs or exists
      if exists and virtual_times[lane] then
        redis.call('HSET', META, 'virtual:' .. lane, virtual_times[lane])
      end
      if counts[lane] > 0 and not exists and lane ~= priority then
        reset_tags(lane, lane)
      elseif exists and redis.call('HLEN', fair_key(lane)) >= MAX_CALLERS then
        local idle, callers = {}, redis.call('HGETALL', fair_key(lane))
        for at = 1, #callers, 2 do
          if (to_number(callers[at + 1]) or 0) <= virtual_time(lane) then
            idle[#idle + 1] = callers[at]
          end
        end
        in_chunks('HDEL', fair_key(lane), idle)
      end
    end
    if not has_pairs then
      reset_tags(priority, priority)
      redis.call('DEL', fair_key(account_flows(priority)))
    elseif #lanes > 1 and virtual_times[priority] then
      redis.call('HSET', META, 'virtual:' .. priority, virtual_times[priority])
    end
  end
end

-- Forget accounts that have had no pairs for long.
for _, account in ipairs(accounts) do
  local account_pairs = counts[lane_of('interactive', account)] + counts[lane_of('bulk', account)]
  if account_pairs == 0 and account_seen_at[account] < now - REJECTED_MS then
    redis.call('HDEL', QUOTAS, account)
  end
end
if #chosen == 0 then
  add_suspect_group(rest or {})
  return { 'wait', 1 }
end

-- Grant the claim.
claim.digests = chosen
if is_failing then
  redis.call('HSET', MODEL, 'probe', id)
end
redis.call('HSET', CLAIMS, id, cmsgpack.pack({
  replica = claim.replica,
  at = claim.at,
  send_at = claim.send_at,
  slot_at = claim.slot_at,
  lease_until = claim.lease_until,
  lease_ms = claim.lease_until - claim.at,
  run = run_id,
}))
-- The key is deleted first, because it may have any type.
redis.call('UNLINK', BASE .. 'granted:' .. replica)
redis.call('HSET', BASE .. 'granted:' .. replica, 'id', id)
redis.call('PEXPIRE', BASE .. 'granted:' .. replica, 600000)

-- Charge the quotas.
local tats = {}
for account, account_pairs in pairs(charged) do
  local before = quota_tat(account, rates[account])
  local after = math.max(before, claim.slot_at) + account_pairs * 1000 / rates[account]
  tats[account] = { before, after }
  redis.call('ZADD', QUOTA_TATS, string.format('%.17g', after), account)
end
if next(tats) then
  redis.call('ZREMRANGEBYSCORE', QUOTA_TATS, '-inf', now - HOUR_MS)
end
redis.call('HSET', CLAIM_PAIRS, id,
  cmsgpack.pack({ table.concat(chosen), rest and table.concat(rest) or false, next(tats) and tats or nil }))
redis.call('HSET', META, 'since_probe', is_probe and 0 or meta_number('since_probe') + 1)

-- Consume the limit. What it was before is kept, so that the slot can be returned while no later claim relies
-- on it.
local pairs_after = math.max(pairs_tat, claim.slot_at) + interval_ms(pairs_rate, #chosen)
local calls_after = math.max(calls_tat, claim.slot_at) + interval_ms(calls_rate, 1)
redis.call('HSET', LIMIT, 'last', id, 'pairs_before', pairs_tat, 'calls_before', calls_tat,
  'pairs_after', pairs_after, 'calls_after', calls_after, 'pairs_tat', pairs_after, 'calls_tat', calls_after)
return batch_reply(claim)
