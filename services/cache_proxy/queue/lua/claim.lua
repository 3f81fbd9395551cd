-- Take the next batch and its slot, if a call is allowed now.
-- ARGV[1]  replica   ARGV[2]  the claim's id, chosen by the claimer: repeated, it gives the same batch
-- ARGV[3]  pairs a second   ARGV[4]  calls a second   (0: no limit)   ARGV[5]  most pairs in a batch
--          (of these three the deployment's own, in Redis, come first)
-- ARGV[6]  most bytes in a batch   ARGV[7]  linger, ms   ARGV[8]  lease, ms
-- ARGV[9]  how long before its slot a full batch may be claimed, ms
-- ARGV[10] the server that the replica's last heartbeat reached
-- ARGV[11] ms ago that the replica's own last call failed; -1: it was answered, or too long ago to matter
-- Returns  {'wait', ms; -1 if nothing waits}
--          {'aside', ms}: another replica's calls are answered, and this one's are not
--          {'batch', ms until it may be sent, ms until its slot, msgpack list of {digest, company, title, ms waited},
--           contexts of the spans that wait for them, at most MAX_LINKS,
--           the request that queued all of them, '' if there were several}
local replica, id, ahead = ARGV[1], ARGV[2], tonumber(ARGV[9])
own = { pairs_per_second = tonumber(ARGV[3]), calls_per_second = tonumber(ARGV[4]), batch_pairs = tonumber(ARGV[5]) }
local settings = redis.call('HMGET', LIMIT, 'pairs_per_second', 'calls_per_second')
local pairs_rate, calls_rate = rate_of(settings[1]) or own.pairs_per_second, rate_of(settings[2]) or own.calls_per_second
local batch_pairs, batch_bytes, linger = pairs_in_batch(own.batch_pairs), tonumber(ARGV[6]), tonumber(ARGV[7])
local LEAD_MS = 15 -- from here to the model takes about so long: the slot of a batch that could go at once
local PAIRS_A_MS = 50 -- and so many pairs take a millisecond more
local HEARTBEAT_MS, QUIET_MS = 300, 1200
local SUSPECT_EVERY = 3 -- at most every fourth call is a probe while others wait
local GATHER_MS = 50 -- where nothing but quotas holds pairs back, so many ms' worth of them go together

local function as_batch(claim)
  local batch, contexts, known, request = {}, {}, {}, nil
  for _, digest in ipairs(claim.digests) do
    local pair = records[digest]
    if pair and pair.claim == id then
      batch[#batch + 1] = { digest, pair.company, pair.title, claim.at - pair.at }
      local queued_by = type(pair.request) == 'string' and pair.request or ''
      request = (request or queued_by) == queued_by and queued_by or ''
      for _, context in ipairs(pair.trace and #contexts < MAX_LINKS and contexts_of(pair) or {}) do
        if not known[context] then
          known[context], contexts[#contexts + 1] = true, context
        end
      end
    end
  end
  return { 'batch', math.ceil(claim.send_at - now), math.ceil(claim.slot_at - now), cmsgpack.pack(batch), contexts,
    request or '' }
end

local mine = load_claim(id)
if mine then
  load_pairs(mine.digests)
  return as_batch(mine)
end
-- A replica numbers its claims. One that was granted before is over: this is a copy of the script that took long on its
-- way, and the replica has stopped waiting for its reply. What it would take would go nowhere until the claim is reaped.
do
  local MOST_COPIES_LATE = 10000 -- ids: what is further ahead was not given by this replica
  local function serial_of(name)
    return type(name) == 'string' and number(string.match(name, '%.(%d+)$')) or nil
  end
  local granted, serial = serial_of(redis.pcall('HGET', BASE .. 'granted:' .. replica, 'id')), serial_of(id)
  if granted and serial and serial <= granted and granted - serial < MOST_COPIES_LATE then
    return { 'wait', 1 }
  end
end
reap()

-- The limit: two theoretical arrival times (GCRA). What is not there, cannot be, or is another server's (a restart,
-- a failover that may have lost the last write), means that all may just have been spent.
local function interval(per_second, cost)
  return per_second > 0 and cost * 1000 / per_second or 0
end
local run = this_run()
if ARGV[10] ~= run then -- what it may just have spent elsewhere is not told here yet: see heartbeat.lua
  return { 'wait', HEARTBEAT_MS / 2 }
end
local limit = redis.call('HMGET', LIMIT, 'run', 'pairs_tat', 'calls_tat', 'not_before')
local pairs_tat, calls_tat, not_before = number(limit[2]), number(limit[3]), not_before_of(limit[4])
local failing, most_pairs = false, batch_pairs
do
  local failures, backoff_until, breaking = model.backoff()
  not_before = math.max(not_before, backoff_until)
  if failures > 0 and not breaking then -- one small call at a time finds out whether the model is back
    failing, most_pairs = true, math.min(model.PROBE_PAIRS, batch_pairs)
  end
end
local burst = math.max(interval(pairs_rate, batch_pairs), interval(calls_rate, 1))
local latest = now + burst + ahead + LEAD_MS + batch_pairs / PAIRS_A_MS + LATE_MS
if limit[1] ~= run or not pairs_tat or not calls_tat or pairs_tat > latest or calls_tat > latest then
  pairs_tat, calls_tat = now + burst, now + burst
  if limit[1] and limit[1] ~= run and burst > 0 then
    -- The server before this one may still serve others: a planned failover has two masters for a second. Until each
    -- side knows the other for silent, and keeps to its own moments, this one is.
    not_before = math.max(not_before, now + QUIET_MS)
    redis.call('HSET', LIMIT, 'not_before', not_before)
  end
  redis.call('HSET', LIMIT, 'run', run, 'pairs_tat', pairs_tat, 'calls_tat', calls_tat)
  redis.call('HDEL', LIMIT, 'last') -- what was spent before is not given back
  suspect_quotas()
end

-- Replicas that may have lost Redis have their share of every quota, as they have moments of their own.
load_quotas()
local silent, members, quiet = silent_replicas(replica), {}, {}
if #silent > 0 then
  for _, gone in ipairs(silent) do
    quiet[gone] = true
  end
  local all = 0
  for member in string.gmatch(redis.call('HGET', LIMIT, 'members') or '', '[^,]+') do
    members[#members + 1] = member
    all = all + (quiet[member] and 0 or 1)
  end
  for _, account in ipairs(accounts) do
    rates[account] = rates[account] * math.max(1, all) / math.max(1, #members)
  end
end

-- What may go out now, by lane, and who came first of it. An account's interactive pairs go first.
local waiting, oldest, held_until = 0, nil, nil
local counts, offered = {}, {}
local function offer(lane, most)
  local count = redis.call('ZCARD', lane_key(lane))
  counts[lane] = count
  local first = count > 0 and redis.call('ZRANGE', lane_key(lane), 0, 0) or {}
  load_pairs(first)
  local pair = records[first[1]]
  offered[lane] = math.min(count, math.max(most, pair and pair.paid and 1 or 0))
  waiting = waiting + offered[lane]
  if pair and offered[lane] > 0 and (not oldest or pair.at < oldest) then
    oldest = math.min(now, pair.at)
  end
  return count
end
for _, priority in ipairs(LANES) do
  offer(priority, math.huge)
end
for _, account in ipairs(accounts) do
  local rate, count = rates[account], 0
  local left = may_send(account, rate, now + LEAD_MS)
  for _, priority in ipairs(ASKED) do
    local there = offer(lane_of(priority, account), left)
    left, count = math.max(0, left - there), count + there
  end
  if count > 0 and rate > 0 then
    local spent, burst = quota_of(account, rate)
    local again = spent + 1000 / rate - burst - LEAD_MS
    held_until = math.min(held_until or again, again)
  end
end
local groups = redis.call('LLEN', GROUPS)
if waiting == 0 and groups == 0 then
  return { 'wait', held_until and math.ceil(math.max(GATHER_MS, held_until - now)) or -1 }
end

-- A replica whose own calls fail leaves the slots to those whose calls are answered, and tells them that pairs wait.
local AGAIN_MS = 200
if tonumber(ARGV[11]) >= 0 then
  local other = redis.call('HMGET', META, 'answered_by', 'answered_at')
  if other[1] and other[1] ~= replica and (number(other[2]) or 0) > now - tonumber(ARGV[11])
    and now - (number(redis.call('ZSCORE', REPLICAS, other[1])) or 0) <= SILENT_MS then
    publish('', {})
    return { 'aside', AGAIN_MS }
  end
end
if failing and redis.call('HEXISTS', CLAIMS, redis.call('HGET', MODEL, 'probe') or '') == 1 then
  return { 'wait', AGAIN_MS }
end

local probing = groups > 0 and (waiting == 0 or meta('since_probe') >= SUSPECT_EVERY)
local group = {}
if probing then
  local packed = unpack_safely(redis.call('LINDEX', GROUPS, -1))
  group = packed and type(packed[1]) == 'string' and split(packed[1]) or {}
end
local count = math.min(most_pairs, probing and #group or waiting)
local company_until = not probing and not failing and waiting < batch_pairs and oldest and oldest + linger or now
local wait = math.max(0, company_until - now, not_before - now, calls_rate > 0 and calls_tat - now or 0,
  pairs_rate > 0 and pairs_tat + interval(pairs_rate, count) - interval(pairs_rate, batch_pairs) - now or 0)
local early = waiting >= batch_pairs and not failing and ahead or LEAD_MS
if wait > early or company_until > now then
  return { 'wait', math.ceil(math.max(company_until - now, wait - early, 1)) }
end
-- Somebody who may have lost Redis calls the model at moments of his own: then all keep to theirs. Moments are
-- `slot` apart; members have them in turn, a block each; those of the silent are left alone,
-- and so is the last of each block when they are close together. (See slots.py.)
local slot = moment_ms()
if #silent > 0 and slot > 0 then
  local block = math.ceil(1000 / slot)
  local moment = math.floor((now + LEAD_MS) / slot)
  local owner = members[math.floor(moment / block) % math.max(1, #members) + 1]
  local between = block > 2 and moment % block == block - 1
  if (owner and quiet[owner]) or between or math.abs(moment * slot - now) > LEAD_MS then
    return { 'wait', math.max(1, (moment + 1) * slot - now) }
  end
end

-- It may be sent from `send_at` on, a little before which it is claimed, so that a busy Redis costs no slot.
local chosen, size, looked = {}, 0, 0
local claim = { replica = replica, lease_until = now + wait + tonumber(ARGV[8]), at = now,
  send_at = now + wait, slot_at = now + math.max(wait, LEAD_MS + count / PAIRS_A_MS) }
local function is_wanted(digest)
  local pair = records[digest]
  if pair and not anybody_waits(pair) then
    forget(digest)
    return false
  end
  return pair ~= false
end
local function add(digest, most, strictly)
  local more = records[digest].size
  if (#chosen > 0 or strictly) and size + more > most then -- what is too large alone goes alone
    return false
  end
  size = size + more
  chosen[#chosen + 1] = digest
  return true
end

local rest
local spending = {} -- account -> pairs that its quota is spent for
if probing then
  redis.call('RPOP', GROUPS)
  load_pairs(group)
  local alive = {}
  for _, digest in ipairs(group) do
    if records[digest] and records[digest].suspect and is_wanted(digest) then
      alive[#alive + 1] = digest
    end
  end
  local function caller(at)
    return records[alive[at]].caller
  end
  -- By caller first: whose pairs are fine should not wait for whose are not.
  table.sort(alive, function(one, other)
    if records[one].caller ~= records[other].caller then
      return records[one].caller < records[other].caller
    end
    return one < other
  end)
  local function boundary(at)
    return at == #alive or caller(at) ~= caller(at + 1)
  end
  local half = math.ceil(#alive / 2)
  local below, above = half, half
  while below > 0 and not boundary(below) do
    below = below - 1
  end
  while above < #alive and not boundary(above) do
    above = above + 1
  end
  if below > 0 and (above == #alive or half - below <= above - half) then
    half = below
  elseif above < #alive then
    half = above
  end
  rest = {}
  local full = false
  for at, digest in ipairs(alive) do
    full = full or at > half or #chosen == most_pairs or not add(digest, batch_bytes)
    if full then
      rest[#rest + 1] = digest
    end
  end
else
  -- A stream is what a lane may send now, in its order; `tag` is its first pair's place among all of the priority's.
  local taken = {}
  local function advance(stream, room)
    while true do
      stream.at = stream.at + 1
      if stream.at > #stream.found then
        if looked >= AT_ONCE + batch_pairs then
          return false
        end
        local most = math.min(CHUNK, room, stream.account and 2 * #stream.found + 16 or CHUNK)
        stream.found = redis.call('ZRANGE', lane_key(stream.lane), stream.from, stream.from + most - 1)
        stream.from, stream.at = stream.from + #stream.found, 1
        if #stream.found == 0 then
          return false
        end
        load_pairs(stream.found)
      end
      looked = looked + 1
      local digest = stream.found[stream.at]
      local pair = records[digest]
      local tag = pair and not pair.claim and not pair.suspect and tag_in(pair, stream.lane)
      if not tag then
        place(stream.lane, digest, false) -- it does not belong here
      elseif not taken[digest] and is_wanted(digest) then
        if stream.account and not pair.paid and stream.left < 1 then
          return false
        end
        stream.digest, stream.own_tag = digest, tag
        stream.tag = stream.account and account_tag(stream.priority, stream.account) or tag
        return true
      end
    end
  end
  local heaps = {} -- priority -> its streams, a binary heap by tag
  local function sift_down(heap)
    local at = 1
    while true do
      local least = at
      for child = 2 * at, math.min(2 * at + 1, #heap) do
        least = heap[child].tag < heap[least].tag and child or least
      end
      if least == at then
        return
      end
      heap[at], heap[least], at = heap[least], heap[at], least
    end
  end
  local function heap_of(priority, room)
    if not heaps[priority] then
      local heap = {}
      for _, lane in ipairs(lanes_of(priority)) do
        local stream = { lane = lane, priority = priority, account = account_of(lane), left = offered[lane],
          from = 0, at = 0, found = {} }
        if offered[lane] > 0 and advance(stream, room) then
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
  local function fill(priority, most_pairs, most_bytes, strictly)
    if most_pairs < 1 then
      return
    end
    local room, heap = most_pairs, heap_of(priority, most_pairs)
    while room > 0 and #heap > 0 do
      local stream = heap[1]
      local digest = stream.digest
      if not taken[digest] and records[digest] then -- not by another stream meanwhile
        if not add(digest, most_bytes, strictly) then
          return
        end
        taken[digest], room = true, room - 1
        virtuals[priority] = math.max(virtual(priority), stream.tag)
        if stream.account then
          virtuals[stream.lane] = math.max(virtual(stream.lane), stream.own_tag)
          take_turn(priority, stream.account, stream.tag)
          if not records[digest].paid and rates[stream.account] > 0 then
            stream.left = stream.left - 1
            records[digest].paid = id
            spending[stream.account] = (spending[stream.account] or 0) + 1
          end
        end
      end
      if not advance(stream, math.max(room, 1)) then
        heap[1] = heap[#heap]
        heap[#heap] = nil
      end
      sift_down(heap)
    end
  end
  -- Nothing is taken out of a lane before all is chosen, so places in it hold.
  if most_pairs > 1 then
    fill('bulk', math.ceil(most_pairs / BULK_SHARE), math.floor(batch_bytes / BULK_SHARE), true)
  end
  for _, lane in ipairs(LANES) do
    fill(lane, most_pairs - #chosen, batch_bytes)
  end
end
for _, digest in ipairs(chosen) do
  local pair = records[digest]
  if not pair.suspect then
    leave_lanes(digest)
  end
  pair.claim, pair.suspect = id, nil
  save(digest)
end
write()
write_ends()
local function begin_anew(lane, turns)
  redis.call('DEL', fair_key(turns))
  redis.call('HDEL', META, 'virtual:' .. lane)
end
for _, priority in ipairs(LANES) do
  local lanes, any = lanes_of(priority), false
  for _, lane in ipairs(lanes) do
    local exists = counts[lane] > 0 and redis.call('EXISTS', lane_key(lane)) == 1
    any = any or exists
    if exists and virtuals[lane] then
      redis.call('HSET', META, 'virtual:' .. lane, virtuals[lane])
    end
    if counts[lane] > 0 and not exists and lane ~= priority then -- nobody waits in it: whoever comes next starts anew
      begin_anew(lane, lane)
    elseif exists and redis.call('HLEN', fair_key(lane)) >= MAX_CALLERS then
      local over, callers = {}, redis.call('HGETALL', fair_key(lane))
      for at = 1, #callers, 2 do
        if (number(callers[at + 1]) or 0) <= virtual(lane) then
          over[#over + 1] = callers[at]
        end
      end
      in_chunks('HDEL', fair_key(lane), over)
    end
  end
  if not any then
    begin_anew(priority, priority)
    redis.call('DEL', fair_key(turns_of(priority)))
  elseif #lanes > 1 and virtuals[priority] then
    redis.call('HSET', META, 'virtual:' .. priority, virtuals[priority])
  end
end
for _, account in ipairs(accounts) do
  local there = counts[lane_of('interactive', account)] + counts[lane_of('bulk', account)]
  if there == 0 and seen_at[account] < now - REFUSED_MS then
    redis.call('HDEL', QUOTAS, account)
  end
end
if #chosen == 0 then
  suspects(rest or {})
  return { 'wait', 1 }
end

claim.digests = chosen
if failing then
  redis.call('HSET', MODEL, 'probe', id)
end
redis.call('HSET', CLAIMS, id, cmsgpack.pack({ replica = claim.replica, at = claim.at, send_at = claim.send_at,
  slot_at = claim.slot_at, lease_until = claim.lease_until, lease_ms = claim.lease_until - claim.at, run = run }))
redis.call('UNLINK', BASE .. 'granted:' .. replica) -- of whatever type
redis.call('HSET', BASE .. 'granted:' .. replica, 'id', id)
redis.call('PEXPIRE', BASE .. 'granted:' .. replica, 600000)
local spent = {}
for account, count in pairs(spending) do
  local before = quota_of(account, rates[account])
  local after = math.max(before, claim.slot_at) + count * 1000 / rates[account]
  spent[account] = { before, after }
  redis.call('ZADD', SPENT, string.format('%.17g', after), account)
end
if next(spent) then
  redis.call('ZREMRANGEBYSCORE', SPENT, '-inf', now - HOUR_MS)
end
redis.call('HSET', CLAIMED, id,
  cmsgpack.pack({ table.concat(chosen), rest and table.concat(rest) or false, next(spent) and spent or nil }))
redis.call('HSET', META, 'since_probe', probing and 0 or meta('since_probe') + 1)
local pairs_after = math.max(pairs_tat, claim.slot_at) + interval(pairs_rate, #chosen)
local calls_after = math.max(calls_tat, claim.slot_at) + interval(calls_rate, 1)
redis.call('HSET', LIMIT, 'last', id, 'pairs_before', pairs_tat, 'calls_before', calls_tat,
  'pairs_after', pairs_after, 'calls_after', calls_after, 'pairs_tat', pairs_after, 'calls_tat', calls_after)
return as_batch(claim)
