#!lua name=longshore_@VERSION@

-- Every move of a ticket: its hash, its stream entries and the counters change in one atomic act, so that
-- issued = sum of the states holds at any moment. Owns no key names and no policy: Python passes both.
--
-- KEYS of every function: tickets stream, rollouts stream, active set, counts, epoch, dead letters.
-- ARGV[1]: the prefix of the job's ticket hashes. They carry the hash tag of the keys, so they live in the same slot.
--
-- A ticket's hash exists exactly while the ticket is not final:
--   state     queued | running | delivered
--   attempt   fencing number: grows with every start, and never goes back
--   tries     attempts that count against the limit: a drained one does not
--   entry     its entry in the tickets stream, while queued or running
--   holder    the actor of the newest attempt
--   nonce     the call that made the newest attempt, so that a repeated call is not a second attempt
--   rollout, sha256   its entry in the rollouts stream and the payload's digest, once delivered

local ACTORS = 'actors'
local LEARNER = 'learner'
local MAX_DEAD_LETTERS = '1000'
-- A larger payload is left out of its dead letter; 1000 of them must not fill the broker.
local MAX_DEAD_PAYLOAD = 256 * 1024

local function open_job(keys, args)
  return {
    tickets = keys[1], rollouts = keys[2], active = keys[3], counts = keys[4], epoch = keys[5], dead = keys[6],
    prefix = args[1],
  }
end

-- Returns a refusal for a learner that has been superseded. An epoch above ours is one that we lost with our tail.
local function fence(job, epoch)
  local current = redis.call('GET', job.epoch) or '0'
  if tonumber(epoch) < tonumber(current) then
    return {'fenced', current}
  end
  if tonumber(epoch) > tonumber(current) then
    redis.call('SET', job.epoch, epoch)
  end
  return nil
end

local function count(job, state, change)
  if change ~= 0 then
    redis.call('HINCRBY', job.counts, 'state:' .. state, change)
  end
end

local function load(job, key)
  local name = job.prefix .. key
  local found = redis.call('HMGET', name, 'state', 'attempt', 'tries', 'entry', 'nonce', 'rollout', 'sha256')
  if not found[1] then
    return nil
  end
  return {
    key = key, name = name, state = found[1], attempt = tonumber(found[2]), tries = tonumber(found[3]),
    entry = found[4], nonce = found[5], rollout = found[6], sha256 = found[7],
  }
end

-- The ticket, if this attempt still holds it. The entry is compared too: a ticket that was issued again after the
-- broker lost its tail counts its attempts from 1 again.
local function held(job, key, attempt, entry)
  local ticket = load(job, key)
  if ticket and ticket.state == 'running' and ticket.attempt == tonumber(attempt) and ticket.entry == entry then
    return ticket
  end
  return nil
end

local function drop(stream, group, entry)
  redis.call('XACK', stream, group, entry)
  redis.call('XDEL', stream, entry)
end

local function fields_of(stream, entry)
  local found = redis.call('XRANGE', stream, entry, entry)
  return found[1] and found[1][2]
end

-- Copies an entry to the dead letters, with the reason.
local function bury(job, kind, key, fields, reason, detail)
  local letter = {'kind', kind, 'key', key, 'reason', reason, 'detail', detail}
  for i = 1, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    if name == 'payload' and #value > MAX_DEAD_PAYLOAD then
      name, value = 'payload_bytes', #value
    end
    if name ~= 'key' then
      letter[#letter + 1] = name
      letter[#letter + 1] = value
    end
  end
  redis.call('XADD', job.dead, 'MAXLEN', '~', MAX_DEAD_LETTERS, '*', unpack(letter))
end

-- Ends a ticket: only its count remains.
local function finish(job, ticket, outcome)
  if ticket.state == 'delivered' then
    drop(job.rollouts, LEARNER, ticket.rollout)
  else
    drop(job.tickets, ACTORS, ticket.entry)
  end
  redis.call('DEL', ticket.name)
  redis.call('SREM', job.active, ticket.key)
  count(job, ticket.state, -1)
  count(job, outcome, 1)
end

-- Ends a ticket that got no rollout: a dead letter for people, a notice on the rollouts stream for the learner.
local function fail(job, ticket, reason, detail)
  local fields = fields_of(job.tickets, ticket.entry) or {}
  fields[#fields + 1] = 'attempt'
  fields[#fields + 1] = ticket.attempt
  bury(job, 'ticket', ticket.key, fields, reason, detail)
  redis.call('XADD', job.rollouts, '*', 'schema', '1', 'key', ticket.key, 'attempt', ticket.attempt, 'final', reason)
  finish(job, ticket, reason)
end

-- ARGV: prefix, at_least. Returns the new epoch, above `at_least` and above every earlier one.
local function open_epoch(keys, args)
  local job = open_job(keys, args)
  local current = tonumber(redis.call('GET', job.epoch) or '0')
  local epoch = string.format('%d', math.max(current, tonumber(args[2])) + 1)
  redis.call('SET', job.epoch, epoch)
  return epoch
end

-- ARGV: prefix, at_least. Returns the epoch that is now in force.
local function raise_epoch(keys, args)
  local job = open_job(keys, args)
  local current = redis.call('GET', job.epoch) or '0'
  if tonumber(args[2]) <= tonumber(current) then
    return current
  end
  redis.call('SET', job.epoch, args[2])
  return args[2]
end

-- ARGV: prefix, epoch, then (key, payload) of each ticket. Returns {'ok', number of tickets that were not known}.
local function issue(keys, args)
  local job = open_job(keys, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  local issued = 0
  for i = 3, #args, 2 do
    local key, payload = args[i], args[i + 1]
    local name = job.prefix .. key
    if redis.call('EXISTS', name) == 0 then
      local entry = redis.call('XADD', job.tickets, '*', 'key', key, 'payload', payload)
      redis.call('HSET', name, 'state', 'queued', 'attempt', 0, 'tries', 0, 'entry', entry)
      redis.call('SADD', job.active, key)
      issued = issued + 1
    end
  end
  if issued > 0 then
    redis.call('HINCRBY', job.counts, 'issued', issued)
    count(job, 'queued', issued)
  end
  return {'ok', issued}
end

local function start_one(job, entry, key, actor, nonce, max_attempts)
  local ticket = load(job, key)
  if not ticket or ticket.entry ~= entry or (ticket.state ~= 'queued' and ticket.state ~= 'running') then
    -- It ended or moved on while this entry was on its way.
    drop(job.tickets, ACTORS, entry)
    return 0
  end
  if ticket.nonce == nonce then
    return ticket.attempt
  end
  if ticket.tries >= max_attempts then
    fail(job, ticket, 'attempts_exhausted', 'the lease of the last attempt ran out')
    return 0
  end
  redis.call('HSET', ticket.name, 'state', 'running', 'attempt', ticket.attempt + 1, 'tries', ticket.tries + 1,
    'holder', actor, 'nonce', nonce)
  if ticket.state == 'queued' then
    count(job, 'queued', -1)
    count(job, 'running', 1)
  end
  return ticket.attempt + 1
end

-- ARGV: prefix, actor, nonce, max_attempts, then (entry, key) of each. Returns an attempt each; 0: nothing to do.
local function start(keys, args)
  local job = open_job(keys, args)
  local attempts = {}
  for i = 5, #args, 2 do
    attempts[#attempts + 1] = start_one(job, args[i], args[i + 1], args[2], args[3], tonumber(args[4]))
  end
  return attempts
end

-- ARGV: prefix, actor, then (key, attempt, entry) of each. Resets idle times. Returns 1 for each still held, else 0.
local function renew(keys, args)
  local job = open_job(keys, args)
  local kept = {}
  for i = 3, #args, 3 do
    local ticket = held(job, args[i], args[i + 1], args[i + 2])
    if ticket then
      redis.call('XCLAIM', job.tickets, ACTORS, args[2], 0, ticket.entry, 'JUSTID')
    end
    kept[#kept + 1] = ticket and 1 or 0
  end
  return kept
end

-- ARGV: prefix, key, attempt, entry, max_attempts, whether the attempt counts ('1' | '0'), reason.
-- Returns 1, or 0 when the attempt is no longer held.
local function give_back(keys, args)
  local job = open_job(keys, args)
  local ticket = held(job, args[2], args[3], args[4])
  if not ticket then
    return 0
  end
  local tries = ticket.tries - (args[6] == '1' and 0 or 1)
  if tries >= tonumber(args[5]) then
    fail(job, ticket, 'attempts_exhausted', args[7])
    return 1
  end
  local entry = redis.call('XADD', job.tickets, '*', unpack(fields_of(job.tickets, ticket.entry)))
  drop(job.tickets, ACTORS, ticket.entry)
  redis.call('HSET', ticket.name, 'state', 'queued', 'tries', tries, 'entry', entry)
  count(job, 'running', -1)
  count(job, 'queued', 1)
  return 1
end

-- ARGV: prefix, key, attempt, entry, reason, detail. Returns 1, or 0 when the attempt is no longer held.
local function reject(keys, args)
  local job = open_job(keys, args)
  local ticket = held(job, args[2], args[3], args[4])
  if not ticket then
    return 0
  end
  fail(job, ticket, args[5], args[6])
  return 1
end

-- ARGV: prefix, key, attempt, entry, sha256, codec, payload.
-- Returns 'delivered', 'repeated' (these very bytes are there already), or why not: 'gone', 'taken'.
local function deliver(keys, args)
  local job = open_job(keys, args)
  local ticket = held(job, args[2], args[3], args[4])
  if not ticket then
    ticket = load(job, args[2])
    if not ticket then
      return 'gone'
    end
    return ticket.state == 'delivered' and ticket.sha256 == args[5] and 'repeated' or 'taken'
  end
  local rollout = redis.call('XADD', job.rollouts, '*', 'schema', '1', 'codec', args[6], 'sha256', args[5],
    'key', ticket.key, 'attempt', ticket.attempt, 'payload', args[7])
  drop(job.tickets, ACTORS, ticket.entry)
  redis.call('HSET', ticket.name, 'state', 'delivered', 'rollout', rollout, 'sha256', args[5])
  count(job, 'running', -1)
  count(job, 'delivered', 1)
  return 'delivered'
end

-- ARGV: prefix, epoch, then (entry or '', key, outcome) of each. Returns {'ok'}.
-- The learner is the authority: a ticket ends whatever its state, for a broker that lost its tail may know less.
local function acknowledge(keys, args)
  local job = open_job(keys, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  for i = 3, #args, 3 do
    if args[i] ~= '' then
      drop(job.rollouts, LEARNER, args[i])
    end
    local ticket = load(job, args[i + 1])
    if ticket then
      finish(job, ticket, args[i + 2])
    end
  end
  return {'ok'}
end

-- ARGV: prefix, epoch, entry, key, reason, detail. Returns {'ok'}.
local function dead_letter(keys, args)
  local job = open_job(keys, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  local fields = fields_of(job.rollouts, args[3])
  if fields then
    bury(job, 'rollout', args[4], fields, args[5], args[6])
    drop(job.rollouts, LEARNER, args[3])
  end
  local ticket = load(job, args[4])
  if ticket then
    finish(job, ticket, 'rejected')
  end
  return {'ok'}
end

-- ARGV: prefix, epoch, reason, limit. Ends at most `limit` tickets, so that no call holds the broker for long.
-- Returns {'ok', number left, state, number ended, ...}.
local function close(keys, args)
  local job = open_job(keys, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  local ended = {queued = 0, running = 0, delivered = 0}
  for _, key in ipairs(redis.call('SPOP', job.active, args[4])) do
    local ticket = load(job, key)
    if ticket then
      finish(job, ticket, args[3])
      ended[ticket.state] = ended[ticket.state] + 1
    end
  end
  return {'ok', redis.call('SCARD', job.active),
    'queued', ended.queued, 'running', ended.running, 'delivered', ended.delivered}
end

-- Only what brings in new payloads is refused when the broker's memory is full: everything else helps to free it.
local function register(name, callback, flags)
  redis.register_function{function_name = 'longshore_@VERSION@_' .. name, callback = callback, flags = flags}
end

register('issue', issue, {})
register('deliver', deliver, {})
register('open_epoch', open_epoch, {'allow-oom'})
register('raise_epoch', raise_epoch, {'allow-oom'})
register('start', start, {'allow-oom'})
register('renew', renew, {'allow-oom'})
register('give_back', give_back, {'allow-oom'})
register('reject', reject, {'allow-oom'})
register('acknowledge', acknowledge, {'allow-oom'})
register('dead_letter', dead_letter, {'allow-oom'})
register('close', close, {'allow-oom'})
