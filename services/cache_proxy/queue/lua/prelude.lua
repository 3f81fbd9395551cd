-- Functions that every script of the queue shares. Python puts this file in front of each script, and in
-- front of it `FORMAT` (see redis_keys.py) and `IS_STANDBY`, which is true for standby.lua alone.
--
-- KEYS[1]  LIMIT: the limit of the deployment, which all model versions share, and the membership
-- KEYS[2]  BASE: what the keys of a namespace's queue begin with. All keys share one hash tag
-- KEYS[3]  CHANNEL: where the ends of pairs are published. Its name has the number of the database, because
--          PUBLISH ignores databases. It is declared as a key so that it is rejected where the ACL would
--          reject its name
-- KEYS[4]  MODEL: the failures of the model target of the replica, for all namespaces that call it: failures
--          (calls in a row), failed_at, backoff_until, pushback_until (requested by the model), breaking (1
--          after a breakdown), probe (the last claim that was granted while calls failed)
-- KEYS[5]  INVALIDATIONS: what the keys of the log and the tombstones of invalidations begin with
--
-- A pair that has not ended has a record in PAIRS. It waits in a lane, is a suspect, or is in-flight in a
-- claim. There is a lane for each priority and, in the priorities that callers may request, one for each
-- account (`interactive:NAME`). Accounts are the callers that the file of quotas names, and `interactive:` is
-- that of all other callers together. A pair that several accounts request waits in a lane of each.
--
-- Times are milliseconds of Redis's own clock, the only one that all replicas share. Any value in Redis may
-- be garbage: a value that is not valid is treated as absent, and a key of a wrong type is an error, after
-- which the queue is reset (reset.lua).
--
-- Field `format` of LIMIT is the format of the replicas that use the shared queue. A script of another format
-- writes nothing, and replies with the error QUEUEFORMAT and the format that it found. LIMIT and the keys
-- that begin with it have no format: replicas of all formats share them, so there is one limit.
local LIMIT, BASE, CHANNEL, MODEL, INVALIDATIONS = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local PAIRS, SUSPECT_GROUPS, META = BASE .. 'pairs', BASE .. 'suspects', BASE .. 'meta'
-- A claim without its pairs, which are many, and its pairs.
local CLAIMS, CLAIM_PAIRS = BASE .. 'claims', BASE .. 'claimed'
-- Token of a request that is enqueued in several calls -> what was admitted and follows.
local RESERVATIONS = BASE .. 'reserved'
-- Account -> pairs per second that it may send (0: any number), and when a request last had it.
local QUOTAS = BASE .. 'quotas'
-- Account -> theoretical arrival time of its quota, as in GCRA.
local QUOTA_TATS = LIMIT .. ':spent'
local REPLICAS, ADDRESSES = LIMIT .. ':replicas', LIMIT .. ':addresses'
-- Silent replica -> until when what a probe found of it is valid.
local PAUSED, ALONE = LIMIT .. ':paused', LIMIT .. ':alone'
-- Replica of another format -> 'FORMAT:MS', the time of its last heartbeat (see standby.lua).
local STANDBY = LIMIT .. ':standby'

local PRIORITIES = { 'interactive', 'bulk', 'refresh' }
local PRIORITY_RANK = { interactive = 1, bulk = 2, refresh = 3 }
-- What callers may request, so the priorities in which accounts have lanes.
local CALLER_PRIORITIES = { 'interactive', 'bulk' }
local RECENT_MS, REJECTED_MS, HOUR_MS = 60000, 600000, 3600000
-- Heartbeats come every 300 ms.
local SILENT_MS, CUT_OFF_MS = 800, 2000
-- Arguments of one command: many at once, but Lua's stack is limited.
local CHUNK_ARGUMENTS = 400
local DIGEST_BYTES = 16
-- Pairs that one script returns or finds unwanted. Redis does nothing else meanwhile.
local MAX_PAIRS_PER_SCRIPT = 2000
local MAX_OWNER_DEATHS, MAX_SINGLE_SUSPECTS = 2, 16
-- A tenth of a batch, in pairs and in bytes, is kept for bulk.
local BULK_DIVISOR = 10
-- A batch that is later is released: other replicas may send its pairs sooner.
local MAX_LATE_MS = 1000
-- The model accepts no more.
local MAX_BATCH_PAIRS = 1000
-- Contexts of callers' spans: bytes of one, and how many are kept for a pair and for a batch.
local CONTEXT_BYTES, MAX_CONTEXTS, MAX_LINKS = 24, 4, 64
-- Callers choose their names: those beyond this number share one flow.
local MAX_CALLERS = 100
-- Operators name at most 1000 accounts in a file, but files change.
local MAX_ACCOUNTS = 5000
-- Lanes of one pair. Further accounts wait where the pair is.
local MAX_POSITIONS = 8
-- What an account may save up, so that a late call costs it nothing: the longer of both.
local BURST_SLOTS, BURST_MS = 1.5, 1000

-- Reject at the start what would be rejected in the middle: a script that stops halfway is worse than one
-- that does not run, since a pair that has a record and is in no lane waits for ever. Redis 6.2 has no such
-- function.
if redis.acl_check_cmd then
  local function check(name, ...)
    local is_known, is_allowed = pcall(redis.acl_check_cmd, name, ...)
    return not (is_known and is_allowed) and name
  end
  local function check_all()
    local of_one_key = { 'DEL', 'EXISTS', 'HGETALL', 'HKEYS', 'HLEN', 'LLEN', 'RPOP', 'TYPE', 'UNLINK' }
    for _, name in ipairs(of_one_key) do
      if check(name, BASE) then
        return name
      end
    end
    return check('ZCARD', BASE) or check('HDEL', BASE, 'a') or check('HEXISTS', BASE, 'a')
      or check('HGET', BASE, 'a')
      or check('HINCRBY', BASE, 'a', '1') or check('HMGET', BASE, 'a') or check('HSET', BASE, 'a', '1')
      or check('HSETNX', BASE, 'a', '1') or check('LINDEX', BASE, '0') or check('LPUSH', BASE, 'a')
      or check('LRANGE', BASE, '0', '0') or check('LTRIM', BASE, '0', '0') or check('PEXPIRE', BASE, '1')
      or check('RPUSH', BASE, 'a') or check('ZADD', BASE, '1', 'a') or check('ZCOUNT', BASE, '0', '0')
      or check('ZRANGE', BASE, '0', '0') or check('ZRANGEBYSCORE', BASE, '0', '0') or check('ZREM', BASE, 'a')
      or check('ZREMRANGEBYSCORE', BASE, '0', '0') or check('ZSCORE', BASE, 'a') or check('INFO', 'server')
      or check('TIME') or check('PUBLISH', CHANNEL, '') or check('PUBSUB', 'NUMSUB', CHANNEL)
  end
  local rejected = check_all()
  if rejected then
    rejected = string.lower(rejected)
    return redis.error_reply("NOPERM this user has no permissions to run the '" .. rejected .. "' command")
  end
end

-- The format of the replicas that use the shared queue. Replicas that have set none have format 1.
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

-- With memory full, Redis rejects commands that may need some until a script has written anything. The queue
-- has bounds of its own and must go on: a pair that ends frees memory.
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
  for first = 1, #arguments, CHUNK_ARGUMENTS do
    local last = math.min(first + CHUNK_ARGUMENTS - 1, #arguments)
    redis.call(command, key, unpack(arguments, first, last))
  end
end

-- Return a packed table, or nil for anything else.
local function unpack_safely(packed)
  if not packed then
    return nil
  end
  local is_valid, value = pcall(cmsgpack.unpack, packed)
  return is_valid and type(value) == 'table' and value or nil
end

-- Return a number that is exact, so neither infinite nor NaN, or nil.
local function to_number(value)
  local found = tonumber(value)
  return found and math.abs(found) < 2 ^ 53 and found or nil
end

-- The limits of this replica, used where Redis has none that can be read. A script that has them as arguments
-- sets them.
local own_limits = {}

-- Return calls or pairs per second (0: no limit) if the value is one that settings allow, or nil.
local function to_rate(value)
  local found = to_number(value)
  return found and (found == 0 or found >= 1e-7 and found <= 1e9) and found or nil
end

local function meta_number(field)
  return to_number(redis.call('HGET', META, field)) or 0
end

local function split_digests(digests)
  local list = {}
  for at = 1, #digests - DIGEST_BYTES + 1, DIGEST_BYTES do
    list[#list + 1] = string.sub(digests, at, at + DIGEST_BYTES - 1)
  end
  return list
end

-- Load the accounts that have pairs in this queue, or recently had: a list, and by account its pairs per
-- second and when it last had pairs. Return the list.
local accounts, rates, account_seen_at
local function load_quotas()
  if not accounts then
    accounts, rates, account_seen_at = {}, {}, {}
    -- No proxy writes so many.
    if redis.call('HLEN', QUOTAS) > MAX_ACCOUNTS then
      redis.call('DEL', QUOTAS)
    end
    local stored = redis.call('HGETALL', QUOTAS)
    for at = 1, #stored, 2 do
      local account = stored[at]
      local rate, seen_at = string.match(stored[at + 1], '^([^:]+):(%d+)$')
      accounts[#accounts + 1] = account
      rates[account] = math.max(0, to_number(rate) or 0)
      account_seen_at[account] = to_number(seen_at) or 0
    end
  end
  return accounts
end

local function priority_of(lane)
  return string.match(lane, '^%l+')
end

local function rank_of(lane)
  return PRIORITY_RANK[priority_of(lane)]
end

-- Return the account of a lane, nil for a priority's own lane.
local function account_of(lane)
  return string.match(lane, '^%l+:(.*)$')
end

local function lane_of(priority, account)
  return account and priority .. ':' .. account or priority
end

local function are_valid_positions(also)
  if also == nil then
    return true
  elseif type(also) ~= 'table' then
    return false
  end
  for lane, position in pairs(also) do
    if type(lane) ~= 'string' or not rank_of(lane) or type(position) ~= 'table'
      or type(position[1]) ~= 'number' or type(position[2]) ~= 'string' then
      return false
    end
  end
  return true
end

-- A record of a pair:
--   lane, tag, caller   where it waits, its position there, and who requested it
--   also                further lanes in which it waits -> {tag, caller}
--   at                  when it came
--   company, title, size
--   interest            replica -> until when a caller waits there
--   claim               the claim in which it is in-flight
--   suspect             true if it is a suspect
--   attempts            failed calls that it was in
--   refusals            rejected batches that it was in
--   deaths              claims that it was in whose replica died
--   paid                the claim for which a quota was charged: a pair that is sent again is not charged
--   trace               contexts of the spans of callers that are traced, at most MAX_CONTEXTS, in turn
--   request             the request that enqueued it
local function is_valid_record(digest, pair)
  return pair and #digest == DIGEST_BYTES
    and type(pair.lane) == 'string' and rank_of(pair.lane) and are_valid_positions(pair.also)
    and type(pair.interest) == 'table' and type(pair.tag) == 'number' and type(pair.at) == 'number'
    and type(pair.attempts) == 'number' and type(pair.deaths) == 'number' and type(pair.refusals) == 'number'
    and type(pair.size) == 'number' and type(pair.caller) == 'string' and type(pair.company) == 'string'
    and type(pair.title) == 'string' or false
end

-- The records that this script needs, each loaded once (false: there is none), and what it changes: the
-- digests of changed records, lane -> digest -> new tag (false: none), and the sum of texts' bytes.
-- `write_changes` writes all of it together, for a call into Redis costs more than what it does.
local records, changed_digests, lane_moves, bytes_delta = {}, {}, {}, 0
local function load_pairs(digests)
  local missing = {}
  for _, digest in ipairs(digests) do
    if records[digest] == nil then
      records[digest] = false
      missing[#missing + 1] = digest
    end
  end
  for first = 1, #missing, CHUNK_ARGUMENTS do
    local last = math.min(first + CHUNK_ARGUMENTS - 1, #missing)
    for place, packed in ipairs(redis.call('HMGET', PAIRS, unpack(missing, first, last))) do
      local digest = missing[first + place - 1]
      local pair = unpack_safely(packed)
      records[digest] = is_valid_record(digest, pair) and pair
    end
  end
end

local function mark_changed(digest)
  changed_digests[digest] = true
end

local function set_lane_tag(lane, digest, tag)
  lane_moves[lane] = lane_moves[lane] or {}
  lane_moves[lane][digest] = tag
end

-- Call `visit` with each lane in which a pair waits, and its tag there.
local function each_position(pair, visit)
  visit(pair.lane, pair.tag)
  for lane, position in pairs(pair.also or {}) do
    visit(lane, position[1])
  end
end

local function tag_in_lane(pair, lane)
  local position = pair.lane == lane and { pair.tag } or pair.also and pair.also[lane]
  return position and position[1]
end

local function remove_from_lanes(digest)
  each_position(records[digest], function(lane)
    set_lane_tag(lane, digest, false)
  end)
end

-- Suspects that this script removes.
local removed_suspects = {}
local function remove_pair(digest)
  local pair = records[digest]
  bytes_delta = bytes_delta - pair.size
  removed_suspects[digest] = pair.suspect or nil
  if not pair.claim and not pair.suspect then
    remove_from_lanes(digest)
  end
  records[digest] = false
  mark_changed(digest)
end

-- Virtual time of a lane, or of the accounts of a priority (see `start_tag`).
local virtual_times = {}
local function virtual_time(lane)
  virtual_times[lane] = virtual_times[lane] or meta_number('virtual:' .. lane)
  return virtual_times[lane]
end

local function is_known_lane(lane)
  local account = account_of(lane)
  return not account or (load_quotas() and rates[account] ~= nil)
end

-- Let a pair wait in its lanes. A quota that was removed holds no pair back, so its lane is left.
local function put_in_lanes(digest)
  local pair = records[digest]
  pair.claim, pair.suspect = nil, nil
  if not is_known_lane(pair.lane) then
    pair.lane = priority_of(pair.lane)
    pair.tag = virtual_time(pair.lane)
  end
  for lane in pairs(pair.also or {}) do
    pair.also[lane] = is_known_lane(lane) and pair.also[lane] or nil
  end
  each_position(pair, function(lane, tag)
    set_lane_tag(lane, digest, tag)
  end)
  mark_changed(digest)
end

-- Let a pair wait in front of all that came since. (The tags of a lane that was empty meanwhile began at 0
-- again.)
local function put_in_front(digest)
  local pair = records[digest]
  pair.tag = math.min(pair.tag, virtual_time(pair.lane) - 1)
  for lane, position in pairs(pair.also or {}) do
    position[1] = math.min(position[1], virtual_time(lane) - 1)
  end
  put_in_lanes(digest)
end

-- (Blocks hide names from the scripts: Lua allows 200 local variables in a chunk.)
local write_changes
do
  -- Remove each group of suspects of which no pair is left. Otherwise that would happen only when the group
  -- is probed, which may be long after and costs a call. Groups behind the first hundred are removed then.
  local function remove_empty_groups()
    local first, kept = redis.call('LRANGE', SUSPECT_GROUPS, 0, 99), {}
    for _, packed in ipairs(first) do
      local group = unpack_safely(packed)
      local digests = group and type(group[1]) == 'string' and split_digests(group[1]) or {}
      local is_concerned, is_alive = false, true
      for _, digest in ipairs(digests) do
        is_concerned = is_concerned or removed_suspects[digest]
      end
      if is_concerned then
        load_pairs(digests)
        is_alive = false
        for _, digest in ipairs(digests) do
          is_alive = is_alive or records[digest] and records[digest].suspect
        end
      end
      if is_alive then
        kept[#kept + 1] = packed
      end
    end
    if #kept < #first then
      redis.call('LTRIM', SUSPECT_GROUPS, #first, -1)
      for at = #kept, 1, -1 do
        redis.call('LPUSH', SUSPECT_GROUPS, kept[at])
      end
    end
    removed_suspects = {}
  end

  function write_changes()
    if next(removed_suspects) then
      remove_empty_groups()
    end

    -- Records.
    local gone, kept = {}, {}
    for digest in pairs(changed_digests) do
      if records[digest] then
        kept[#kept + 1] = digest
        kept[#kept + 1] = cmsgpack.pack(records[digest])
      else
        gone[#gone + 1] = digest
      end
    end
    in_chunks('HDEL', PAIRS, gone)
    in_chunks('HSET', PAIRS, kept)

    -- Lanes.
    for lane, moves in pairs(lane_moves) do
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

    -- Bytes of texts that are held.
    if #gone > 0 and redis.call('EXISTS', PAIRS) == 0 then
      redis.call('HDEL', META, 'bytes')
    elseif bytes_delta ~= 0 then
      redis.call('HINCRBY', META, 'bytes', bytes_delta)
    end
    changed_digests, lane_moves, bytes_delta = {}, {}, 0
  end
end

-- Return a claim without its pairs, or nil: replica, at (when it was granted), send_at, slot_at, lease_until,
-- lease_ms, run (the server that granted it, or took it over at `since`), all by the clock of this server.
local function load_lease(packed)
  local claim = unpack_safely(packed)
  if claim and type(claim.replica) == 'string' and type(claim.at) == 'number'
    and type(claim.send_at) == 'number' and type(claim.slot_at) == 'number'
    and type(claim.lease_until) == 'number' then
    return claim
  end
end

-- Return a claim with its digests, the rest of the suspects if it is a probe, and what it consumed of quotas:
-- account -> {arrival time before, arrival time after}.
local function load_claim(id)
  local claim = load_lease(redis.call('HGET', CLAIMS, id))
  if claim then
    local held = unpack_safely(redis.call('HGET', CLAIM_PAIRS, id)) or {}
    claim.digests = type(held[1]) == 'string' and split_digests(held[1]) or {}
    claim.rest = type(held[2]) == 'string' and split_digests(held[2]) or nil
    claim.spent = type(held[3]) == 'table' and held[3] or {}
  end
  return claim
end

local function delete_claim(id)
  redis.call('HDEL', CLAIMS, id)
  redis.call('HDEL', CLAIM_PAIRS, id)
end

-- Start-time fair queueing (Goyal, Vin, Cheng 1996). The next pair of a caller starts where its last one
-- ends, and never before the virtual time of the lane. So a caller with a thousand pairs does not go before
-- one with two. Finish tags by lane and caller, as they were and as this script changes them.
local finish_tags, changed_finish_tags = {}, {}
local function start_tag(lane, caller)
  finish_tags[lane] = finish_tags[lane] or {}
  local known = finish_tags[lane]
  known[caller] = known[caller] or to_number(redis.call('HGET', fair_key(lane), caller)) or 0
  return math.max(virtual_time(lane), known[caller])
end

local function take_start_tag(lane, caller)
  local tag = start_tag(lane, caller)
  changed_finish_tags[lane] = changed_finish_tags[lane] or {}
  finish_tags[lane][caller] = tag + 1
  changed_finish_tags[lane][caller] = tag + 1
  return tag
end

-- Return the flow to which a caller's pairs belong: its own one, or '' for those beyond MAX_CALLERS.
local function flow_of(lane, caller)
  local is_known = redis.call('HEXISTS', fair_key(lane), caller) == 1
  return (is_known or redis.call('HLEN', fair_key(lane)) < MAX_CALLERS) and caller or ''
end

local function write_finish_tags()
  for lane, known in pairs(changed_finish_tags) do
    local fields = {}
    for caller, tag in pairs(known) do
      fields[#fields + 1] = caller
      fields[#fields + 1] = tag
    end
    in_chunks('HSET', fair_key(lane), fields)
  end
end

-- Accounts are flows as callers are, but their pairs get tags only when they are sent: pairs that a quota
-- held back do not gain a better position meanwhile.
local function account_flows(priority)
  return 'accounts:' .. priority
end

local function account_start_tag(priority, account)
  return math.max(virtual_time(priority), start_tag(account_flows(priority), account))
end

local function advance_account(priority, account, tag)
  local flows = account_flows(priority)
  changed_finish_tags[flows] = changed_finish_tags[flows] or {}
  finish_tags[flows] = finish_tags[flows] or {}
  finish_tags[flows][account] = tag + 1
  changed_finish_tags[flows][account] = tag + 1
end

local function has_waiters(pair)
  for _, deadline in pairs(pair.interest) do
    if type(deadline) == 'number' and deadline > now then
      return true
    end
  end
  return false
end

-- Return the contexts of spans that a pair has, at most MAX_CONTEXTS whatever is stored.
local function contexts_of(pair)
  local found = {}
  local trace = type(pair.trace) == 'string' and pair.trace or ''
  for at = 1, math.min(#trace, CONTEXT_BYTES * MAX_CONTEXTS) - CONTEXT_BYTES + 1, CONTEXT_BYTES do
    found[#found + 1] = string.sub(trace, at, at + CONTEXT_BYTES - 1)
  end
  return found
end

-- Add the context of a caller's span. Return whether the pair has changed.
local function add_context(pair, context)
  if type(context) ~= 'string' or #context ~= CONTEXT_BYTES then
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

local function add_suspect_group(digests)
  if #digests > 0 then
    redis.call('LPUSH', SUSPECT_GROUPS, cmsgpack.pack({ table.concat(digests) }))
  end
end

-- Return the id of this queue, which its first use sets: after a flush it is another queue.
local function queue_id()
  redis.call('HSETNX', META, 'queue', clock[1] .. '.' .. clock[2] .. CHANNEL)
  return redis.call('HGET', META, 'queue')
end

-- Publish to all replicas how pairs ended.
--   levels  digest and level byte in turn
--   errors  list of {digest, error}
--   all     an error that ends all pairs that wait
--   pause   {ms, error, target}: for so long the target is not called
-- A replica notices by the number that it missed a message, and drops messages with the id of another queue,
-- because a channel belongs to all databases of a server. A message without content means that pairs wait
-- which a replica may claim.
local function publish(levels, errors, all, pause)
  local published = redis.call('HINCRBY', META, 'published', 1)
  local queue = queue_id()
  redis.call('PUBLISH', CHANNEL, cmsgpack.pack({ published, levels, errors, all or false, queue, pause }))
end

-- End a claim and let its pairs wait again: as suspects if it was a probe, otherwise in front of their lanes.
-- `each` may change a record, or end it by returning false. Pairs whose replica died with them too often
-- become suspects: each alone, or in one group if they are many, since a replica may be killed for another
-- reason. Return whether any pair waits again.
local function return_pairs(id, claim, each)
  delete_claim(id)
  load_pairs(claim.digests)
  local suspect_again, deadly, any = {}, {}, false
  for _, digest in ipairs(claim.digests) do
    local pair = records[digest]
    if pair and pair.claim == id and (not each or each(digest, pair)) then
      pair.claim = nil
      local is_deadly = pair.deaths >= MAX_OWNER_DEATHS
      if not has_waiters(pair) then
        remove_pair(digest)
      else
        any = true
        if claim.rest or is_deadly then
          pair.suspect = true
          mark_changed(digest)
          table.insert(is_deadly and deadly or suspect_again, digest)
        else
          put_in_front(digest)
        end
      end
    end
  end
  if #deadly > MAX_SINGLE_SUSPECTS then
    add_suspect_group(deadly)
  else
    for _, digest in ipairs(deadly) do
      add_suspect_group({ digest })
    end
  end
  for _, digest in ipairs(claim.rest or {}) do
    suspect_again[#suspect_again + 1] = digest
  end
  add_suspect_group(suspect_again)
  return any or #suspect_again > 0
end

-- Return the id of this server, which is another one after each start.
local server_run_id
do
  local run_id
  function server_run_id()
    run_id = run_id or string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
    return run_id
  end
end

-- Return how many subscribers this server has for a replica. A replica subscribes at the server that has the
-- queue, and follows it (see replica_session.py).
local function subscribers_of(replica)
  return redis.call('PUBSUB', 'NUMSUB', CHANNEL .. ':' .. replica)[2]
end

-- Return until when a probe's result is valid. That is seconds (see peer_probe.py), so a time far ahead is
-- garbage.
local function valid_until(states, replica)
  local found = to_number(redis.call('HGET', states, replica)) or 0
  return found <= now + RECENT_MS and found or 0
end

-- Return the pairs of claims that no replica works on any longer:
-- - claims whose lease is over;
-- - claims of a replica that sends no heartbeats and is not subscribed. A paused process is still subscribed,
--   so it keeps its claims until the deadline of the model;
-- - claims of a replica that runs and lost Redis alone: it could not publish the model's answers;
-- - claims of the replica `holder` that are not in `held`: the reply that granted them was lost.
local reap
do
  local GRANTED_MS = 2000

  -- Another server granted the claim, before a failover or a restart. Its times are those of another clock,
  -- which may differ by minutes, and its replica may not be connected here yet. So its lease begins again,
  -- and for GRANTED_MS nothing ends it.
  local function adopt(id, claim)
    claim.lease_until = now + (to_number(claim.lease_ms) or claim.lease_until - claim.at)
    claim.run = server_run_id()
    claim.since = now
    redis.call('HSET', CLAIMS, id, cmsgpack.pack(claim))
  end

  local function is_abandoned(id, claim, holder, held)
    local adopted_at = to_number(claim.since)
    if adopted_at and math.abs(now - adopted_at) <= GRANTED_MS then
      return false
    end
    local silent_ms = now - (to_number(redis.call('ZSCORE', REPLICAS, claim.replica)) or 0)
    local is_cut_off = silent_ms > CUT_OFF_MS and valid_until(ALONE, claim.replica) > now
    local is_unheld = claim.replica == holder and not held[id] and now - (adopted_at or claim.at) > GRANTED_MS
    local is_gone = silent_ms > SILENT_MS and subscribers_of(claim.replica) == 0
    return is_gone or is_cut_off or is_unheld or now > claim.lease_until, is_unheld or is_cut_off
  end

  function reap(holder, held)
    local stored, any, returned = redis.call('HGETALL', CLAIMS), false, 0
    for at = 1, #stored, 2 do
      -- The next heartbeat goes on.
      if returned > MAX_PAIRS_PER_SCRIPT then
        break
      end
      local id = stored[at]
      local claim = load_lease(stored[at + 1])
      if not claim then
        delete_claim(id)
      else
        if type(claim.run) == 'string' and claim.run ~= server_run_id() then
          adopt(id, claim)
        end
        local is_over, is_alive = is_abandoned(id, claim, holder, held)
        if is_over then
          local lost = load_claim(id)
          returned = returned + #lost.digests
          any = return_pairs(id, lost, function(_, pair)
            pair.deaths = pair.deaths + (is_alive and 0 or 1)
            return true
          end) or any
        end
      end
    end
    write_changes()
    if any then
      publish('', {})
    end
  end
end

-- Return the replicas, of any model version, that are silent and may yet call the model: they may have lost
-- Redis alone. The replica that claims is not one of them.
local function silent_replicas(claimer)
  local silent = {}
  for _, replica in ipairs(redis.call('ZRANGEBYSCORE', REPLICAS, '-inf', '(' .. (now - SILENT_MS))) do
    if replica ~= claimer and valid_until(PAUSED, replica) < now then
      silent[#silent + 1] = replica
    end
  end
  return silent
end

-- Return the pairs in a batch, as the replica that started last set it, or `default` if that cannot be read.
local function deployment_batch_pairs(default)
  local found = math.floor(to_number(redis.call('HGET', LIMIT, 'batch_pairs')) or 0)
  return found >= 1 and found <= MAX_BATCH_PAIRS and found or default
end

-- Return the milliseconds between full batches.
local function slot_ms()
  local limit = redis.call('HMGET', LIMIT, 'pairs_per_second', 'calls_per_second')
  local pairs_rate = to_rate(limit[1]) or own_limits.pairs_per_second or 0
  local calls_rate = to_rate(limit[2]) or own_limits.calls_per_second or 0
  local batch_pairs = deployment_batch_pairs(own_limits.batch_pairs or 0)
  local by_pairs = pairs_rate > 0 and batch_pairs * 1000 / pairs_rate or 0
  local by_calls = calls_rate > 0 and 1000 / calls_rate or 0
  return math.max(by_pairs, by_calls)
end

-- Return the milliseconds between the time slots of members without Redis: a little more, since clocks
-- differ.
local function time_slot_ms()
  return math.ceil(1.03 * slot_ms())
end

-- Return the lane of a priority, and those of the accounts in it.
local function lanes_of(priority)
  local lanes = { priority }
  for _, account in ipairs(priority == 'refresh' and {} or load_quotas()) do
    lanes[#lanes + 1] = lane_of(priority, account)
  end
  return lanes
end

-- Return the theoretical arrival time of an account's quota, at a rate above 0, and what it may save up, in
-- ms. If nothing is stored, the quota was not used, unless all may have been lost: then it counts as fully
-- used since.
local quota_burst_ms, quotas_since, stored_tats
local function quota_tat(account, rate)
  quota_burst_ms = quota_burst_ms or math.max(BURST_MS, BURST_SLOTS * slot_ms())
  if not quotas_since then
    quotas_since = to_number(redis.call('HGET', LIMIT, 'quotas_since'))
    if not quotas_since or quotas_since > now then
      quotas_since = now
      redis.call('HSET', LIMIT, 'quotas_since', now)
    end
  end
  local burst_ms = math.max(quota_burst_ms, 1000 / rate)
  if not stored_tats then
    stored_tats = {}
    local stored =
      redis.call('ZRANGEBYSCORE', QUOTA_TATS, now, '+inf', 'WITHSCORES', 'LIMIT', 0, MAX_ACCOUNTS)
    for at = 1, #stored, 2 do
      stored_tats[stored[at]] = to_number(stored[at + 1])
    end
  end
  local tat = stored_tats[account] or 0
  -- It is garbage, or of another rate.
  if tat > now + burst_ms + MAX_LATE_MS then
    tat = now + burst_ms
  end
  return math.max(tat, quotas_since + burst_ms), burst_ms
end

-- Return how many pairs an account may send until a time; any number if its quota has no rate.
local function sendable_pairs(account, rate, at)
  if rate == 0 then
    return math.huge
  end
  local tat, burst_ms = quota_tat(account, rate)
  return math.max(0, math.floor((at + burst_ms - math.max(tat, at)) * rate / 1000 + 1e-6))
end

-- Let all quotas count as fully used now: what accounts sent may have been lost, or was sent without this
-- server.
local function assume_quotas_spent()
  redis.call('HSET', LIMIT, 'quotas_since', now)
end

-- Return the time before which no replica may call the model. What is hours away is garbage.
local function to_not_before(value)
  local found = to_number(value) or 0
  return found <= now + HOUR_MS and found or 0
end

-- What is known of the model from its calls. (One table, since Lua allows 200 local variables.) See
-- outage.py.
local model = { PROBE_PAIRS = 10, LONGEST_BACKOFF_MS = 6000, KEPT_MS = 3600000 }

-- Return the failed calls in a row to the target of this replica, until when it is not called, and whether it
-- broke down over a batch. A backoff is never longer than LONGEST_BACKOFF_MS, so a later time is garbage.
function model.backoff()
  local found = redis.call('HMGET', MODEL, 'failures', 'backoff_until', 'pushback_until', 'breaking')
  local failures = math.max(0, math.floor(to_number(found[1]) or 0))
  local backoff_until = to_number(found[2]) or 0
  backoff_until = backoff_until <= now + model.LONGEST_BACKOFF_MS and backoff_until or 0
  return failures, math.max(backoff_until, to_not_before(found[3])), found[4] == '1'
end

-- Return whether the last failure is so long ago that it means nothing any longer: no call was tried since.
function model.outage_is_over(failed_at, not_before, window_ms)
  return now > math.max(failed_at, not_before) + window_ms + model.LONGEST_BACKOFF_MS
end

-- The model answered a call of this replica: it may be called as the limit allows. Fields of META:
-- failing_since (when the first of the failed calls in a row was noticed, of any target), failing_at (the
-- last one), down (1: the retry window is over), reason (of the last one), answered_at, answered_by (a
-- replica).
function model.record_answer(by)
  redis.call('HDEL', MODEL, 'failures', 'failed_at', 'backoff_until', 'breaking')
  redis.call('HDEL', META, 'failing_since', 'failing_at', 'down', 'reason')
  redis.call('HSET', META, 'answered_at', now, 'answered_by', by)
end

-- Return the slot of a claim, if no later claim was granted since.
function model.free_slot(id)
  local limit = redis.call('HMGET', LIMIT, 'last', 'pairs_before', 'calls_before')
  if limit[1] == id then
    if limit[2] and limit[3] then
      redis.call('HSET', LIMIT, 'pairs_tat', limit[2], 'calls_tat', limit[3])
    end
    redis.call('HDEL', LIMIT, 'last')
  end
end

-- What all replicas counted in a minute: replica -> report. It is for the status page alone, and its parts
-- are opaque here.
local function report_key(minute)
  return string.format('%s:reports:%d', LIMIT, minute)
end

-- Return the last entry of each log of invalidations, false for an empty one. A key of a wrong type counts as
-- a change.
local function last_log_entries(logs)
  for at, log in ipairs(logs) do
    local last = redis.pcall('LINDEX', log, -1)
    logs[at] = type(last) == 'table' and 'garbage' or last
  end
  return logs
end

local function outcome_key(kind, period, ago)
  return BASE .. kind .. ':' .. (math.floor(now / period) - ago)
end

-- Remember outcomes for one to two periods. `fields` is digest and value in turn.
local function remember(kind, period, fields)
  if #fields > 0 then
    local key = outcome_key(kind, period, 0)
    in_chunks('HSET', key, fields)
    redis.call('PEXPIRE', key, 2 * period)
  end
end

-- Return how each of these pairs ended recently: a level, or the list that is an error.
local function recent_outcomes(digests)
  local outcomes = {}
  local function look_up(kind, period, read)
    for ago = 0, 1 do
      local key = outcome_key(kind, period, ago)
      local count = redis.call('EXISTS', key) == 1 and #digests or 0
      for first = 1, count, CHUNK_ARGUMENTS do
        local last = math.min(first + CHUNK_ARGUMENTS - 1, #digests)
        for at, value in ipairs(redis.call('HMGET', key, unpack(digests, first, last))) do
          local digest = digests[first + at - 1]
          outcomes[digest] = outcomes[digest] or read(value)
        end
      end
    end
  end
  look_up('recent', RECENT_MS, function(value)
    local level = to_number(value)
    return level and level >= 1 and level <= 7 and level % 1 == 0 and level or nil
  end)
  look_up('refused', REJECTED_MS, unpack_safely)
  look_up('broke', RECENT_MS, unpack_safely)
  -- An invalid answer is {times, until, error, claim}, see complete.lua.
  look_up('nonsense', RECENT_MS, function(value)
    local seen = unpack_safely(value)
    return seen and to_number(seen[2]) and seen[2] > now and type(seen[3]) == 'table' and seen[3] or nil
  end)
  return outcomes
end

-- Return an error without the model's message about the whole batch, which only one request may see (see
-- serialization.py).
local function redact(error)
  local kept = {}
  for at = 1, error[1] == 'refused' and 5 or 3 do
    kept[at] = error[at]
  end
  return kept
end

-- The model rejected the batch of a claim because of a pair, or broke down over it. The pairs that it named
-- (digest -> error) end. If it named none, one of them is bad, and all become suspects; a pair that was
-- alone, or in `max_rejections` such batches, is taken for the bad one. What ends is remembered as `kind` for
-- a `period`, and published.
local function end_or_suspect(id, claim, error, errors, max_rejections, kind, period)
  delete_claim(id)
  local held, ended, remembered, suspected = {}, {}, {}, {}
  load_pairs(claim.digests)
  for _, digest in ipairs(claim.digests) do
    if records[digest] and records[digest].claim == id then
      held[#held + 1] = digest
    end
  end
  local has_named = next(errors) ~= nil
  for _, digest in ipairs(held) do
    local pair = records[digest]
    pair.refusals = pair.refusals + 1
    local reason = errors[digest]
    if not reason and not has_named and (#held == 1 or pair.refusals >= max_rejections) then
      reason = error
    end
    if reason then
      remove_pair(digest)
      remembered[#remembered + 1] = digest
      remembered[#remembered + 1] = cmsgpack.pack(redact(reason))
      ended[#ended + 1] = { digest, reason }
    elseif not has_waiters(pair) then
      remove_pair(digest)
    elseif has_named then
      put_in_front(digest)
    else
      pair.claim = nil
      pair.suspect = true
      mark_changed(digest)
      suspected[#suspected + 1] = digest
    end
  end

  -- The bad pair was in the half that was probed, so the other half is cleared.
  load_pairs(claim.rest or {})
  for _, digest in ipairs(claim.rest or {}) do
    if records[digest] and records[digest].suspect then
      put_in_front(digest)
    end
  end
  add_suspect_group(suspected)
  write_changes()
  remember(kind, period, remembered)
  publish('', ended)
end
