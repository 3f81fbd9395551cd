-- Take the next batch and its slot, if a call is allowed now.
-- ARGV[1]  replica   ARGV[2]  the claim's id, chosen by the claimer: repeated, it gives the same batch
-- ARGV[3]  pairs a second   ARGV[4]  calls a second   (0: no limit)   ARGV[5]  most pairs in a batch
--          (of these three the deployment's own, in Redis, come first)
-- ARGV[6]  most bytes in a batch   ARGV[7]  linger, ms   ARGV[8]  lease, ms
-- ARGV[9]  how long before its slot a full batch may be claimed, ms
-- ARGV[10] the server that the replica's last heartbeat reached
-- Returns  {'wait', ms; -1 if nothing waits}
--          {'batch', ms until it may be sent, ms until its slot, msgpack list of {digest, company, title, ms waited},
--           contexts of the spans that wait for them, at most MAX_LINKS}
local replica, id, ahead = ARGV[1], ARGV[2], tonumber(ARGV[9])
local function rate(value)
  local found = number(value)
  return found and found >= 0 and found
end
local settings = redis.call('HMGET', LIMIT, 'pairs_per_second', 'calls_per_second')
local pairs_rate, calls_rate = rate(settings[1]) or tonumber(ARGV[3]), rate(settings[2]) or tonumber(ARGV[4])
local batch_pairs, batch_bytes, linger = pairs_in_batch(tonumber(ARGV[5])), tonumber(ARGV[6]), tonumber(ARGV[7])
local LEAD_MS = 15 -- from here to the model takes about so long: the slot of a batch that could go at once
local PAIRS_A_MS = 50 -- and so many pairs take a millisecond more
local HEARTBEAT_MS, QUIET_MS = 250, 1200
local SUSPECT_EVERY = 3 -- at most every fourth call is a probe while others wait

local function as_batch(claim)
  local batch, contexts, known = {}, {}, {}
  for _, digest in ipairs(claim.digests) do
    local pair = records[digest]
    if pair and pair.claim == id then
      batch[#batch + 1] = { digest, pair.company, pair.title, claim.at - pair.at }
      for _, context in ipairs(pair.trace and #contexts < MAX_LINKS and contexts_of(pair) or {}) do
        if not known[context] then
          known[context], contexts[#contexts + 1] = true, context
        end
      end
    end
  end
  return { 'batch', math.ceil(claim.send_at - now), math.ceil(claim.slot_at - now), cmsgpack.pack(batch), contexts }
end

local mine = load_claim(id)
if mine then
  load_pairs(mine.digests)
  return as_batch(mine)
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
end

local waiting, oldest = 0, nil
for _, lane in ipairs(LANES) do
  waiting = waiting + redis.call('ZCARD', lane_key(lane))
  local first = redis.call('ZRANGE', lane_key(lane), 0, 0)
  load_pairs(first)
  local pair = records[first[1]]
  if pair and (not oldest or pair.at < oldest) then
    oldest = math.min(now, pair.at)
  end
end
local groups = redis.call('LLEN', GROUPS)
if waiting == 0 and groups == 0 then
  return { 'wait', -1 }
end

local probing = groups > 0 and (waiting == 0 or meta('since_probe') >= SUSPECT_EVERY)
local group = {}
if probing then
  local packed = unpack_safely(redis.call('LINDEX', GROUPS, -1))
  group = packed and type(packed[1]) == 'string' and split(packed[1]) or {}
end
local count = math.min(batch_pairs, probing and #group or waiting)
local company_until = not probing and waiting < batch_pairs and oldest and oldest + linger or now
local wait = math.max(0, company_until - now, not_before - now, calls_rate > 0 and calls_tat - now or 0,
  pairs_rate > 0 and pairs_tat + interval(pairs_rate, count) - interval(pairs_rate, batch_pairs) - now or 0)
local early = waiting >= batch_pairs and ahead or LEAD_MS
if wait > early or company_until > now then
  return { 'wait', math.ceil(math.max(company_until - now, wait - early, 1)) }
end
-- Somebody who may have lost Redis calls the model at moments of his own: then all keep to theirs. Moments are
-- `slot` apart; members have them in turn, a block each; those of the silent are left alone,
-- and so is the last of each block when they are close together. (See slots.py.)
local silent, slot = silent_replicas(replica), moment_ms()
if #silent > 0 and slot > 0 then
  local members, quiet = {}, {}
  for member in string.gmatch(redis.call('HGET', LIMIT, 'members') or '', '[^,]+') do
    members[#members + 1] = member
  end
  for _, gone in ipairs(silent) do
    quiet[gone] = true
  end
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
    full = full or at > half or #chosen == batch_pairs or not add(digest, batch_bytes)
    if full then
      rest[#rest + 1] = digest
    end
  end
else
  local at = { interactive = 0, bulk = 0, refresh = 0 } -- how far each lane was looked through
  local function fill(lane, most_pairs, most_bytes, strictly)
    local room = most_pairs
    while room > 0 and looked < AT_ONCE + batch_pairs do
      local found = redis.call('ZRANGE', lane_key(lane), at[lane], at[lane] + math.min(room, CHUNK) - 1)
      if #found == 0 then
        return
      end
      load_pairs(found)
      for _, digest in ipairs(found) do
        at[lane], looked = at[lane] + 1, looked + 1
        local pair = records[digest]
        if not pair or pair.claim or pair.suspect or pair.lane ~= lane then
          place(lane, digest, false) -- it does not belong here
        elseif is_wanted(digest) then
          if not add(digest, most_bytes, strictly) then
            at[lane] = at[lane] - 1
            return
          end
          room = room - 1
          virtuals[lane] = math.max(virtual(lane), pair.tag)
        end
      end
    end
  end
  -- Nothing is taken out of a lane before all is chosen, so places in it hold.
  if batch_pairs > 1 then
    fill('bulk', math.ceil(batch_pairs / BULK_SHARE), math.floor(batch_bytes / BULK_SHARE), true)
  end
  for _, lane in ipairs(LANES) do
    fill(lane, batch_pairs - #chosen, batch_bytes)
  end
end
for _, digest in ipairs(chosen) do
  local pair = records[digest]
  if not pair.suspect then
    place(pair.lane, digest, false)
  end
  pair.claim, pair.suspect = id, nil
  save(digest)
end
write()
for _, lane in ipairs(LANES) do
  if redis.call('EXISTS', lane_key(lane)) == 0 then -- nobody waits in it: whoever comes next starts anew
    redis.call('DEL', fair_key(lane))
    redis.call('HDEL', META, 'virtual:' .. lane)
  else
    if virtuals[lane] then
      redis.call('HSET', META, 'virtual:' .. lane, virtuals[lane])
    end
    if redis.call('HLEN', fair_key(lane)) >= MAX_CALLERS then
      local over, callers = {}, redis.call('HGETALL', fair_key(lane))
      for at = 1, #callers, 2 do
        if (number(callers[at + 1]) or 0) <= virtual(lane) then
          over[#over + 1] = callers[at]
        end
      end
      in_chunks('HDEL', fair_key(lane), over)
    end
  end
end
if #chosen == 0 then
  suspects(rest or {})
  return { 'wait', 1 }
end

claim.digests = chosen
redis.call('HSET', CLAIMS, id, cmsgpack.pack({ replica = claim.replica, at = claim.at, send_at = claim.send_at,
  slot_at = claim.slot_at, lease_until = claim.lease_until }))
redis.call('HSET', CLAIMED, id, cmsgpack.pack({ table.concat(chosen), rest and table.concat(rest) or false }))
redis.call('HSET', META, 'since_probe', probing and 0 or meta('since_probe') + 1)
local pairs_after = math.max(pairs_tat, claim.slot_at) + interval(pairs_rate, #chosen)
local calls_after = math.max(calls_tat, claim.slot_at) + interval(calls_rate, 1)
redis.call('HSET', LIMIT, 'last', id, 'pairs_before', pairs_tat, 'calls_before', calls_tat,
  'pairs_after', pairs_after, 'calls_after', calls_after, 'pairs_tat', pairs_after, 'calls_tat', calls_after)
return as_batch(claim)
