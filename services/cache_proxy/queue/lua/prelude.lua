-- What every script of the queue begins with; the scripts below it are one decision each.
--
-- KEYS[1]  the limit, one for a deployment (all model versions share the model), and who shares it
-- KEYS[2]  the base of a namespace's queue; all keys below share its hash tag
-- KEYS[3]  the channel on which pairs' ends are published: it names the database, for PUBLISH knows none. It is no
--          key, but declared as one it is refused where the ACL would refuse its name
-- KEYS[4]  the failures of the replica's model target, of all namespaces whose replicas call it: failures (calls in a
--          row), failed_at, backoff_until, pushback_until (as the model itself asked for), breaking (1 after a
--          breakdown), probe (the last claim that was made while calls failed)
--
-- KEYS[5]  the base of a namespace's log and tombstones of invalidations, the same in every queue format
--
-- `FORMAT` is put in front of this file by Python (see `QueueKeys`): the format of what replicas leave each other
-- under BASE. Field `format` of LIMIT is the format of the replicas that use the shared queue, 1 if it is not there. A
-- script of another format writes nothing, and replies with the error QUEUEFORMAT and the format that it found.
-- LIMIT and the keys that begin with it have no format: replicas of all formats share them, so there is one limit.
--
-- A pair that has not ended has a record in `pairs`: it waits in a lane, is among the suspects, or is in
-- flight in a claim. Lanes are a priority's own, and those of accounts (`interactive:NAME`): callers that the file of
-- quotas names, and `interactive:`, all others together. A pair that several accounts want waits in a lane of each. Times are milliseconds of Redis's own clock, the only one that all replicas share.
-- What is read from Redis may be anything: what is not what it should be is treated as not there, and a key of
-- another type is an error, after which the queue is made anew (`reset.lua`).
local LIMIT, BASE, ENDED, MODEL, INVALIDATIONS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local PAIRS, GROUPS, META = BASE .. 'pairs', BASE .. 'suspects', BASE .. 'meta'
local CLAIMS, CLAIMED = BASE .. 'claims', BASE .. 'claimed' -- who has it until when; its pairs, which are many
local RESERVED = BASE .. 'reserved'
local QUOTAS = BASE .. 'quotas' -- account -> pairs a second that it may send (0: any number), and when it was last told
local SPENT = LIMIT .. ':spent' -- account -> until when its quota is spent: a theoretical arrival time, as in GCRA
local REPLICAS, ADDRESSES = LIMIT .. ':replicas', LIMIT .. ':addresses'
local PAUSED, ALONE = LIMIT .. ':paused', LIMIT .. ':alone' -- replica -> until when that may be relied on
local STANDBY = LIMIT .. ':standby' -- replica of another format -> 'FORMAT:MS', MS when it was last heard of (see standby.lua)
local LANES, RANK = { 'interactive', 'bulk', 'refresh' }, { interactive = 1, bulk = 2, refresh = 3 }
local ASKED = { 'interactive', 'bulk' } -- what a caller may ask for, and so those in which accounts have lanes
local RECENT_MS, REFUSED_MS = 60000, 600000
local SILENT_MS, CUT_OFF_MS = 800, 2000 -- heartbeats come every 300 ms
local CHUNK = 400 -- arguments of one call: many at once, but Lua's stack is not endless
local DIGEST = 16 -- bytes
local AT_ONCE = 2000 -- pairs that one script gives back or finds unwanted: Redis does nothing else meanwhile
local MANY_DEATHS, FEW = 2, 16
local BULK_SHARE = 10 -- a tenth of a batch, in pairs and in bytes, is kept for bulk
local LATE_MS = 1000 -- a batch that is later goes back: others may serve its pairs sooner
local HOUR_MS = 3600000
local MAX_BATCH_PAIRS = 1000 -- the model takes no more
local CONTEXT, MAX_CONTEXTS, MAX_LINKS = 24, 4, 64 -- bytes; for one pair; for one batch
local MAX_CALLERS = 100 -- names are the callers' to choose: those beyond share one turn
local MAX_ACCOUNTS = 5000 -- names in a file are the operator's, at most 1000, but files change
local MAX_PLACES = 8 -- of one pair: whoever comes then waits where it is
local BURST_SLOTS, BURST_MS = 1.5, 1000 -- what an account may save up: so that a call that is late costs it nothing

-- Refuse at the start what would be refused in the middle, for half a script's work is worse than none: a pair that has
-- a record and is in no lane waits for good. 6.2 has no such function.
if redis.acl_check_cmd then
  local function check(name, ...)
    local is_known, is_allowed = pcall(redis.acl_check_cmd, name, ...)
    return not (is_known and is_allowed) and name
  end
  local function check_all()
    for _, name in ipairs({ 'DEL', 'EXISTS', 'HGETALL', 'HKEYS', 'HLEN', 'LLEN', 'RPOP', 'TYPE', 'UNLINK', 'ZCARD' }) do
      if check(name, BASE) then
        return name
      end
    end
    return check('HDEL', BASE, 'a') or check('HEXISTS', BASE, 'a') or check('HGET', BASE, 'a')
      or check('HINCRBY', BASE, 'a', '1') or check('HMGET', BASE, 'a') or check('HSET', BASE, 'a', '1')
      or check('HSETNX', BASE, 'a', '1') or check('LINDEX', BASE, '0') or check('LPUSH', BASE, 'a')
      or check('LRANGE', BASE, '0', '0') or check('LTRIM', BASE, '0', '0') or check('PEXPIRE', BASE, '1')
      or check('RPUSH', BASE, 'a') or check('ZADD', BASE, '1', 'a') or check('ZCOUNT', BASE, '0', '0')
      or check('ZRANGE', BASE, '0', '0') or check('ZRANGEBYSCORE', BASE, '0', '0') or check('ZREM', BASE, 'a')
      or check('ZREMRANGEBYSCORE', BASE, '0', '0') or check('ZSCORE', BASE, 'a') or check('INFO', 'server')
      or check('TIME') or check('PUBLISH', ENDED, '') or check('PUBSUB', 'NUMSUB', ENDED)
  end
  local refused = check_all()
  if refused then
    return redis.error_reply("NOPERM this user has no permissions to run the '" .. string.lower(refused) .. "' command")
  end
end

-- The format of the replicas that use the shared queue. Whoever is there without having said so is of format 1.
local function fleet_format()
  local found = redis.pcall('HGET', LIMIT, 'format')
  if type(found) == 'string' and string.find(found, '^[1-9]%d?%d?%d?$') then
    return tonumber(found)
  end
  if FORMAT == 1 or redis.call('EXISTS', REPLICAS) == 0 then
    return FORMAT
  end
  return 1
end

if fleet_format() ~= FORMAT and not IS_STANDBY then
  return redis.error_reply('QUEUEFORMAT ' .. fleet_format())
end

-- With memory full, Redis refuses what may need some until a script has written anything. The queue has bounds
-- of its own, and it must go on: what ends pairs frees memory.
redis.call('DEL', BASE .. 'nothing')

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local function lane_key(lane)
  return BASE .. 'lane:' .. lane
end

local function fair_key(lane)
  return BASE .. 'fair:' .. lane
end

local function in_chunks(command, key, arguments)
  for first = 1, #arguments, CHUNK do
    redis.call(command, key, unpack(arguments, first, math.min(first + CHUNK - 1, #arguments)))
  end
end

local function unpack_safely(packed)
  if not packed then
    return nil
  end
  local fine, value = pcall(cmsgpack.unpack, packed)
  return fine and type(value) == 'table' and value or nil
end

local function number(value)
  local found = tonumber(value)
  return found and math.abs(found) < 2 ^ 53 and found or nil -- neither infinite nor what is no number
end

-- Calls or pairs a second (0: no limit) if the value is one that settings allow. `own` are this replica's limits, where
-- Redis has none that can be read: a script that has them as arguments fills it.
local own = {}
local function rate_of(value)
  local found = number(value)
  return found and (found == 0 or found >= 1e-7 and found <= 1e9) and found or nil
end

local function meta(field)
  return number(redis.call('HGET', META, field)) or 0
end

local function split(digests)
  local list = {}
  for at = 1, #digests - DIGEST + 1, DIGEST do
    list[#list + 1] = string.sub(digests, at, at + DIGEST - 1)
  end
  return list
end

-- The accounts that have pairs in this queue, or lately had: a list, their pairs a second, when they last had.
local accounts, rates, seen_at
local function load_quotas()
  if not accounts then
    accounts, rates, seen_at = {}, {}, {}
    if redis.call('HLEN', QUOTAS) > MAX_ACCOUNTS then -- nobody of us
      redis.call('DEL', QUOTAS)
    end
    local stored = redis.call('HGETALL', QUOTAS)
    for at = 1, #stored, 2 do
      local rate, seen = string.match(stored[at + 1], '^([^:]+):(%d+)$')
      accounts[#accounts + 1] = stored[at]
      rates[stored[at]], seen_at[stored[at]] = math.max(0, number(rate) or 0), number(seen) or 0
    end
  end
  return accounts
end

local function priority_of(lane)
  return string.match(lane, '^%l+')
end

local function rank_of(lane)
  return RANK[priority_of(lane)]
end

local function account_of(lane) -- nil in a priority's own lane
  return string.match(lane, '^%l+:(.*)$')
end

local function lane_of(priority, account)
  return account and priority .. ':' .. account or priority
end

local function are_sound(also)
  if also == nil then
    return true
  elseif type(also) ~= 'table' then
    return false
  end
  for lane, place in pairs(also) do
    if type(lane) ~= 'string' or not rank_of(lane) or type(place) ~= 'table' or type(place[1]) ~= 'number'
      or type(place[2]) ~= 'string' then
      return false
    end
  end
  return true
end

-- A record: lane, tag, caller, at (when it came), attempts, deaths, refusals, company, title, size,
-- claim (the one that it is in flight in), suspect, interest (replica -> until when somebody waits there),
-- also (other lanes that it waits in -> {tag, caller}), paid (the claim that an account's quota was spent for: a
-- pair that is sent again was paid for), trace (where callers are traced: the contexts of up to MAX_CONTEXTS of their
-- spans, one behind the other), request (the one that queued it).
local function is_sound(digest, pair)
  return pair and #digest == DIGEST and type(pair.lane) == 'string' and rank_of(pair.lane) and are_sound(pair.also) and type(pair.interest) == 'table'
    and type(pair.tag) == 'number' and type(pair.at) == 'number' and type(pair.attempts) == 'number'
    and type(pair.deaths) == 'number' and type(pair.refusals) == 'number' and type(pair.size) == 'number'
    and type(pair.caller) == 'string' and type(pair.company) == 'string' and type(pair.title) == 'string'
    or false
end

-- The pairs that this script has to do with, each loaded once, and what it changes of them: written together
-- by `write`, for a call into Redis costs more than what it does.
local records, changed, places, bytes = {}, {}, {}, 0 -- records: false if there is none
local function load_pairs(digests)
  local missing = {}
  for _, digest in ipairs(digests) do
    if records[digest] == nil then
      records[digest] = false
      missing[#missing + 1] = digest
    end
  end
  for first = 1, #missing, CHUNK do
    local last = math.min(first + CHUNK - 1, #missing)
    for place, packed in ipairs(redis.call('HMGET', PAIRS, unpack(missing, first, last))) do
      local digest, pair = missing[first + place - 1], unpack_safely(packed)
      records[digest] = is_sound(digest, pair) and pair
    end
  end
end

local function save(digest)
  changed[digest] = true
end

local function place(lane, digest, tag)
  places[lane] = places[lane] or {}
  places[lane][digest] = tag
end

local function each_place(pair, visit)
  visit(pair.lane, pair.tag)
  for lane, other in pairs(pair.also or {}) do
    visit(lane, other[1])
  end
end

local function tag_in(pair, lane)
  local other = pair.lane == lane and { pair.tag } or pair.also and pair.also[lane]
  return other and other[1]
end

local function leave_lanes(digest)
  each_place(records[digest], function(lane)
    place(lane, digest, false)
  end)
end

local gone_suspects = {} -- suspects that this script forgets
local function forget(digest)
  local pair = records[digest]
  bytes = bytes - pair.size
  gone_suspects[digest] = pair.suspect or nil
  if not pair.claim and not pair.suspect then
    leave_lanes(digest)
  end
  records[digest] = false
  save(digest)
end

local virtuals = {}
local function virtual(lane)
  virtuals[lane] = virtuals[lane] or meta('virtual:' .. lane)
  return virtuals[lane]
end

local function is_known(lane)
  local account = account_of(lane)
  return not account or (load_quotas() and rates[account] ~= nil)
end

local function wait_in_lane(digest)
  local pair = records[digest]
  pair.claim, pair.suspect = nil, nil
  if not is_known(pair.lane) then -- a quota that is forgotten holds nobody back
    pair.lane, pair.tag = priority_of(pair.lane), virtual(priority_of(pair.lane))
  end
  for lane in pairs(pair.also or {}) do
    pair.also[lane] = is_known(lane) and pair.also[lane] or nil
  end
  each_place(pair, function(lane, tag)
    place(lane, digest, tag)
  end)
  save(digest)
end

-- In front of all that came since. (A lane that was empty meanwhile began to count anew.)
local function wait_in_front(digest)
  local pair = records[digest]
  pair.tag = math.min(pair.tag, virtual(pair.lane) - 1)
  for lane, other in pairs(pair.also or {}) do
    other[1] = math.min(other[1], virtual(lane) - 1)
  end
  wait_in_lane(digest)
end

-- (Blocks keep names from the scripts: Lua allows 200 local variables in a chunk.)
local write
do
  -- A group goes with the last of its suspects for which a request waits, not only when it is probed: that may be long
  -- after, and costs a turn.
  local function drop_empty_groups()
    local first, kept = redis.call('LRANGE', GROUPS, 0, 99), {} -- what is behind goes when it is probed
    for _, packed in ipairs(first) do
      local group = unpack_safely(packed)
      local digests, concerned, alive = group and type(group[1]) == 'string' and split(group[1]) or {}, false, true
      for _, digest in ipairs(digests) do
        concerned = concerned or gone_suspects[digest]
      end
      if concerned then
        load_pairs(digests)
        alive = false
        for _, digest in ipairs(digests) do
          alive = alive or records[digest] and records[digest].suspect
        end
      end
      if alive then
        kept[#kept + 1] = packed
      end
    end
    if #kept < #first then
      redis.call('LTRIM', GROUPS, #first, -1)
      for at = #kept, 1, -1 do
        redis.call('LPUSH', GROUPS, kept[at])
      end
    end
    gone_suspects = {}
  end

  function write()
    if next(gone_suspects) then
      drop_empty_groups()
    end
    local gone, kept = {}, {}
    for digest in pairs(changed) do
      if records[digest] then
        kept[#kept + 1] = digest
        kept[#kept + 1] = cmsgpack.pack(records[digest])
      else
        gone[#gone + 1] = digest
      end
    end
    in_chunks('HDEL', PAIRS, gone)
    in_chunks('HSET', PAIRS, kept)
    for lane, moves in pairs(places) do
      local out, into = {}, {}
      for digest, tag in pairs(moves) do
        if tag then
          into[#into + 1] = tag
          into[#into + 1] = digest
        else
          out[#out + 1] = digest
        end
      end
      in_chunks('ZREM', lane_key(lane), out)
      in_chunks('ZADD', lane_key(lane), into)
    end
    if #gone > 0 and redis.call('EXISTS', PAIRS) == 0 then
      redis.call('HDEL', META, 'bytes')
    elseif bytes ~= 0 then
      redis.call('HINCRBY', META, 'bytes', bytes)
    end
    changed, places, bytes = {}, {}, 0
  end
end

-- A claim: replica, at, send_at, slot_at, lease_until, lease_ms, run (the server that granted it, or that took it over,
-- `since` then), as this server's clock has them; loaded whole, also its digests, of a probe the rest, and what
-- was spent of quotas (account -> {until when before, and after}).
local function load_lease(packed)
  local claim = unpack_safely(packed)
  if claim and type(claim.replica) == 'string' and type(claim.at) == 'number' and type(claim.send_at) == 'number'
    and type(claim.slot_at) == 'number' and type(claim.lease_until) == 'number' then
    return claim
  end
end

local function load_claim(id)
  local claim = load_lease(redis.call('HGET', CLAIMS, id))
  if claim then
    local held = unpack_safely(redis.call('HGET', CLAIMED, id)) or {}
    claim.digests = type(held[1]) == 'string' and split(held[1]) or {}
    claim.rest = type(held[2]) == 'string' and split(held[2]) or nil
    claim.spent = type(held[3]) == 'table' and held[3] or {}
  end
  return claim
end

local function end_claim(id)
  redis.call('HDEL', CLAIMS, id)
  redis.call('HDEL', CLAIMED, id)
end

-- Start-time fair queueing (Goyal, Vin, Cheng 1996): a caller's next pair starts where its last one ends,
-- and never before the lane's virtual time, so a caller with a thousand pairs does not stand before one with two.
local ends, moved = {}, {} -- lane -> caller -> where the caller's last pair ends; as it was, and as it is now
local function first_tag(lane, caller)
  ends[lane] = ends[lane] or {}
  local known = ends[lane]
  known[caller] = known[caller] or number(redis.call('HGET', fair_key(lane), caller)) or 0
  return math.max(virtual(lane), known[caller])
end

local function next_tag(lane, caller)
  local tag = first_tag(lane, caller)
  moved[lane] = moved[lane] or {}
  ends[lane][caller], moved[lane][caller] = tag + 1, tag + 1
  return tag
end

-- In whose turn a caller's pairs go.
local function turn_of(lane, caller)
  local known = redis.call('HEXISTS', fair_key(lane), caller) == 1
  return (known or redis.call('HLEN', fair_key(lane)) < MAX_CALLERS) and caller or ''
end

local function write_ends()
  for lane, known in pairs(moved) do
    local fields = {}
    for caller, tag in pairs(known) do
      fields[#fields + 1] = caller
      fields[#fields + 1] = tag
    end
    in_chunks('HSET', fair_key(lane), fields)
  end
end

-- Accounts have turns like callers, but their pairs get tags only as they go out: what a quota held back has not
-- lined up meanwhile.
local function turns_of(priority)
  return 'accounts:' .. priority
end

local function account_tag(priority, account)
  return math.max(virtual(priority), first_tag(turns_of(priority), account))
end

local function take_turn(priority, account, tag)
  local turns = turns_of(priority)
  moved[turns] = moved[turns] or {}
  ends[turns] = ends[turns] or {}
  ends[turns][account], moved[turns][account] = tag + 1, tag + 1
end

local function anybody_waits(pair)
  for _, deadline in pairs(pair.interest) do
    if type(deadline) == 'number' and deadline > now then
      return true
    end
  end
  return false
end

-- The contexts of spans that a pair has: a few, whatever is there.
local function contexts_of(pair)
  local found, trace = {}, type(pair.trace) == 'string' and pair.trace or ''
  for at = 1, math.min(#trace, CONTEXT * MAX_CONTEXTS) - CONTEXT + 1, CONTEXT do
    found[#found + 1] = string.sub(trace, at, at + CONTEXT - 1)
  end
  return found
end

-- One more caller's; whether that is new.
local function add_context(pair, context)
  if type(context) ~= 'string' or #context ~= CONTEXT then
    return false
  end
  local found = contexts_of(pair)
  for _, known in ipairs(found) do
    if known == context then
      return false
    end
  end
  if #found >= MAX_CONTEXTS then
    return false
  end
  found[#found + 1] = context
  pair.trace = table.concat(found)
  return true
end

local function suspects(digests)
  if #digests > 0 then
    redis.call('LPUSH', GROUPS, cmsgpack.pack({ table.concat(digests) }))
  end
end

-- The id of this queue, made with its first use: a flush makes another queue.
local function queue_id()
  redis.call('HSETNX', META, 'queue', clock[1] .. '.' .. clock[2] .. ENDED)
  return redis.call('HGET', META, 'queue')
end

-- Tell every replica how pairs ended: `levels` is digest and level byte after byte, `errors` a list of
-- {digest, error}, `all` an error that ends everything that waits, `pause` {ms, why, target}: for so long nobody calls it.
-- The number lets a replica notice that it missed one. With nothing else in it, it says that pairs wait which somebody
-- may claim. Receivers drop what has another queue's id: channels are the server's, not the database's.
local function publish(levels, errors, all, pause)
  local published, queue = redis.call('HINCRBY', META, 'published', 1), queue_id()
  redis.call('PUBLISH', ENDED, cmsgpack.pack({ published, levels, errors, all or false, queue, pause }))
end

-- Give a claim's pairs back: to the suspects if it was a probe, else to the front of their lanes. `each` may
-- change a record, or end it by returning false. Those whose owners died with them go alone; when they are many,
-- in halves, for somebody may just kill owners. Whether any wait again.
local function give_back(id, claim, each)
  end_claim(id)
  load_pairs(claim.digests)
  local again, deadly, any = {}, {}, false
  for _, digest in ipairs(claim.digests) do
    local pair = records[digest]
    if pair and pair.claim == id and (not each or each(digest, pair)) then
      pair.claim = nil
      if not anybody_waits(pair) then
        forget(digest)
      else
        any = true
        if claim.rest or pair.deaths >= MANY_DEATHS then
          pair.suspect = true
          save(digest)
          table.insert(pair.deaths >= MANY_DEATHS and deadly or again, digest)
        else
          wait_in_front(digest)
        end
      end
    end
  end
  if #deadly > FEW then
    suspects(deadly)
  else
    for _, digest in ipairs(deadly) do
      suspects({ digest })
    end
  end
  for _, digest in ipairs(claim.rest or {}) do
    again[#again + 1] = digest
  end
  suspects(again)
  return any or #again > 0
end

-- This server, until it is started again.
local this_run
do
  local run_id
  function this_run()
    run_id = run_id or string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
    return run_id
  end
end

-- This server's alone: a replica subscribes where the queue is, and follows it (see `listener.py`).
local function subscribers_of(replica)
  return redis.call('PUBSUB', 'NUMSUB', ENDED .. ':' .. replica)[2]
end

-- Until when a verdict on a replica may be relied on: for seconds (see doors.py), so what is far away is none.
local function relied_on_until(verdicts, replica)
  local found = number(redis.call('HGET', verdicts, replica)) or 0
  return found <= now + RECENT_MS and found or 0
end

-- The claims of the dead go back: of those whose lease is over, and of those that are neither subscribed nor
-- heard of. A paused process is still subscribed, so it keeps its claims until the model's deadline. So do those
-- of a replica that lives and lost Redis alone: whatever the model answers it, nobody else would hear. So do those
-- that a replica was granted in a reply that never arrived: its heartbeat (`held`) does not list them.
local reap
do
  local GRANTED_MS = 2000

  -- A claim that another server granted, before a failover or a restart: its times are of another clock, which may differ
  -- by minutes, and its owner may not be connected here yet. So its lease begins again, and nothing ends it for a moment.
  local function adopt(id, claim)
    claim.lease_until = now + (number(claim.lease_ms) or claim.lease_until - claim.at)
    claim.run, claim.since = this_run(), now
    redis.call('HSET', CLAIMS, id, cmsgpack.pack(claim))
  end

  function reap(replica, held)
    local stored, any, given = redis.call('HGETALL', CLAIMS), false, 0
    for at = 1, #stored, 2 do
      if given > AT_ONCE then -- the next heartbeat goes on
        break
      end
      local id, claim = stored[at], load_lease(stored[at + 1])
      if not claim then
        end_claim(id)
      else
        if type(claim.run) == 'string' and claim.run ~= this_run() then
          adopt(id, claim)
        end
        local since = number(claim.since) -- on this server, if another granted it
        local adopted = since and math.abs(now - since) <= GRANTED_MS
        local heard = number(redis.call('ZSCORE', REPLICAS, claim.replica)) or 0
        local gone = now - heard > SILENT_MS and subscribers_of(claim.replica) == 0
        local cut_off = now - heard > CUT_OFF_MS and relied_on_until(ALONE, claim.replica) > now
        local unheld = claim.replica == replica and not held[id] and now - (since or claim.at) > GRANTED_MS
        if not adopted and (gone or cut_off or unheld or now > claim.lease_until) then
          local dead = load_claim(id)
          given = given + #dead.digests
          any = give_back(id, dead, function(_, pair)
            pair.deaths = pair.deaths + ((unheld or cut_off) and 0 or 1)
            return true
          end) or any
        end
      end
    end
    write()
    if any then
      publish('', {})
    end
  end
end

-- Replicas of any model version that are not heard of and may yet call the model: they may have lost Redis alone.
-- Who asks is not.
local function silent_replicas(asking)
  local silent = {}
  for _, replica in ipairs(redis.call('ZRANGEBYSCORE', REPLICAS, '-inf', '(' .. (now - SILENT_MS))) do
    if replica ~= asking and relied_on_until(PAUSED, replica) < now then
      silent[#silent + 1] = replica
    end
  end
  return silent
end

-- Pairs in a batch, as the newest start has it; `otherwise` where that was lost.
local function pairs_in_batch(otherwise)
  local found = math.floor(number(redis.call('HGET', LIMIT, 'batch_pairs')) or 0)
  return found >= 1 and found <= MAX_BATCH_PAIRS and found or otherwise
end

-- How far apart full batches are.
local function slot_ms()
  local limit = redis.call('HMGET', LIMIT, 'pairs_per_second', 'calls_per_second')
  local pairs_rate = rate_of(limit[1]) or own.pairs_per_second or 0
  local calls_rate = rate_of(limit[2]) or own.calls_per_second or 0
  return math.max(pairs_rate > 0 and pairs_in_batch(own.batch_pairs or 0) * 1000 / pairs_rate or 0,
    calls_rate > 0 and 1000 / calls_rate or 0)
end

-- How far apart the moments of those without Redis are: with some room for clocks that differ.
local function moment_ms()
  return math.ceil(1.03 * slot_ms())
end

-- A priority's own lane, and those of the accounts.
local function lanes_of(priority)
  local lanes = { priority }
  for _, account in ipairs(priority == 'refresh' and {} or load_quotas()) do
    lanes[#lanes + 1] = lane_of(priority, account)
  end
  return lanes
end

-- Until when an account's quota is spent, at a rate above 0; and what of it may be saved up, in ms. That nothing is
-- known of it means that it was not used, unless all may have been forgotten: then, that all was just spent.
local slots_burst_ms, forgotten_at, spent_until_of
local function quota_of(account, rate)
  slots_burst_ms = slots_burst_ms or math.max(BURST_MS, BURST_SLOTS * slot_ms())
  if not forgotten_at then
    forgotten_at = number(redis.call('HGET', LIMIT, 'quotas_since'))
    if not forgotten_at or forgotten_at > now then
      forgotten_at = now
      redis.call('HSET', LIMIT, 'quotas_since', now)
    end
  end
  local burst = math.max(slots_burst_ms, 1000 / rate)
  if not spent_until_of then
    spent_until_of = {}
    local stored = redis.call('ZRANGEBYSCORE', SPENT, now, '+inf', 'WITHSCORES', 'LIMIT', 0, MAX_ACCOUNTS)
    for at = 1, #stored, 2 do
      spent_until_of[stored[at]] = number(stored[at + 1])
    end
  end
  local spent = spent_until_of[account] or 0
  if spent > now + burst + LATE_MS then -- as another rate had it, or nobody of us
    spent = now + burst
  end
  return math.max(spent, forgotten_at + burst), burst
end

-- How many pairs an account may send by then; any number if it has no such quota.
local function may_send(account, rate, at)
  if rate == 0 then
    return math.huge
  end
  local spent, burst = quota_of(account, rate)
  return math.max(0, math.floor((at + burst - math.max(spent, at)) * rate / 1000 + 1e-6))
end

-- What accounts did may have been forgotten, or done elsewhere: all of them may just have spent all.
local function suspect_quotas()
  redis.call('HSET', LIMIT, 'quotas_since', now)
end

-- Before when nobody may call the model, as the last failed call said; what is hours away is no such moment.
local function not_before_of(value)
  local found = number(value) or 0
  return found <= now + HOUR_MS and found or 0
end

-- The model, as its calls go. (One table: Lua has room for 200 local names.)
local model = { PROBE_PAIRS = 10, LONGEST_BACKOFF_MS = 6000, KEPT_MS = 3600000 } -- see outage.py

-- Failed calls in a row to this replica's target, until when nobody calls it, whether it broke down over a batch.
function model.backoff()
  local found = redis.call('HMGET', MODEL, 'failures', 'backoff_until', 'pushback_until', 'breaking')
  local failures, own = math.max(0, math.floor(number(found[1]) or 0)), number(found[2]) or 0
  own = own <= now + model.LONGEST_BACKOFF_MS and own or 0 -- what is later is no backoff of ours
  return failures, math.max(own, not_before_of(found[3])), found[4] == '1'
end

-- Whether failures are so long ago that they say nothing any more: nothing was tried in between.
function model.is_over(failed_at, not_before, window)
  return now > math.max(failed_at, not_before) + window + model.LONGEST_BACKOFF_MS
end

-- The model answered a call of this replica's: it may be called as the limit allows.
-- META: failing_since (when the first of the failed calls in a row was noticed, of any target), failing_at (the last
-- one), down (1: the retry window is over), reason (of the last one), answered_at, answered_by (a replica).
function model.answered(by)
  redis.call('HDEL', MODEL, 'failures', 'failed_at', 'backoff_until', 'breaking')
  redis.call('HDEL', META, 'failing_since', 'failing_at', 'down', 'reason')
  redis.call('HSET', META, 'answered_at', now, 'answered_by', by)
end

-- Give a claim's slot back, while the limit still is what this claim made it.
function model.free_slot(id)
  local limit = redis.call('HMGET', LIMIT, 'last', 'pairs_before', 'calls_before')
  if limit[1] == id then
    if limit[2] and limit[3] then
      redis.call('HSET', LIMIT, 'pairs_tat', limit[2], 'calls_tat', limit[3])
    end
    redis.call('HDEL', LIMIT, 'last')
  end
end

-- What all replicas counted in a minute: replica -> report. For the status page alone; its parts are opaque here.
local function report_key(minute)
  return string.format('%s:reports:%d', LIMIT, minute)
end

local function recent_key(kind, period, ago)
  return BASE .. kind .. ':' .. (math.floor(now / period) - ago)
end

-- `fields` is digest and value in turn. What cannot be remembered is not.
local function remember(kind, period, fields)
  if #fields > 0 then
    local key = recent_key(kind, period, 0)
    in_chunks('HSET', key, fields)
    redis.call('PEXPIRE', key, 2 * period)
  end
end

-- How each of these ended lately: a level, or the list that is an error.
local function recall(digests)
  local outcomes = {}
  local function look(kind, period, read)
    for ago = 0, 1 do
      local key = recent_key(kind, period, ago)
      for first = 1, redis.call('EXISTS', key) * #digests, CHUNK do
        local last = math.min(first + CHUNK - 1, #digests)
        for at, value in ipairs(redis.call('HMGET', key, unpack(digests, first, last))) do
          local digest = digests[first + at - 1]
          outcomes[digest] = outcomes[digest] or read(value)
        end
      end
    end
  end
  look('recent', RECENT_MS, function(value)
    local level = number(value)
    return level and level >= 1 and level <= 7 and level % 1 == 0 and level or nil
  end)
  look('refused', REFUSED_MS, unpack_safely)
  look('broke', RECENT_MS, unpack_safely)
  look('nonsense', RECENT_MS, function(value)
    local seen = unpack_safely(value) -- {times, until, error, claim}, see complete.lua
    return seen and number(seen[2]) and seen[2] > now and type(seen[3]) == 'table' and seen[3] or nil
  end)
  return outcomes
end

-- An error without the model's message about a whole batch, which is one request's alone (see messages.py).
local function told_to_anyone(error)
  local kept = {}
  for at = 1, error[1] == 'refused' and 5 or 3 do
    kept[at] = error[at]
  end
  return kept
end

-- The model refused a claim's batch, or broke down in it, for a pair: those that it named (digest -> error) end.
-- If it named none, one of them is bad, and they are suspects; one that was alone, or in `most` such batches, is
-- taken for the bad one. What ended is remembered as `kind` for a while, and published.
local function convict(id, claim, error, named, most, kind, period)
  end_claim(id)
  local held, ended, remembered, suspected = {}, {}, {}, {}
  load_pairs(claim.digests)
  for _, digest in ipairs(claim.digests) do
    if records[digest] and records[digest].claim == id then
      held[#held + 1] = digest
    end
  end
  for _, digest in ipairs(held) do
    local pair = records[digest]
    pair.refusals = pair.refusals + 1
    local reason = named[digest]
    if not reason and not next(named) and (#held == 1 or pair.refusals >= most) then
      reason = error
    end
    if reason then
      forget(digest)
      remembered[#remembered + 1] = digest
      remembered[#remembered + 1] = cmsgpack.pack(told_to_anyone(reason))
      ended[#ended + 1] = { digest, reason }
    elseif not anybody_waits(pair) then
      forget(digest)
    elseif next(named) then
      wait_in_front(digest)
    else
      pair.claim, pair.suspect = nil, true
      save(digest)
      suspected[#suspected + 1] = digest
    end
  end
  load_pairs(claim.rest or {})
  for _, digest in ipairs(claim.rest or {}) do -- the bad one was in the half that was probed
    if records[digest] and records[digest].suspect then
      wait_in_front(digest)
    end
  end
  suspects(suspected)
  write()
  remember(kind, period, remembered)
  publish('', ended)
end
