/* The recovery round: the database loses the newest of its commits, once, and the journals put back what it lost. protocols: Recovery round. Code: ca/round.go,
   roundwatch.go, reconcile.go, putback.go, roundend.go, batch.go, takeover.go, recover.go; holder. Each step carries the name of the function it stands for.

   One request key K. Nodes 0 and 1 issue; node 2 abandons what its policy refuses. Writer w proposes serial w+1 and its signature is number w+1; writers 0 and 1
   are the nodes', 2 is node 0 after a restart. A commit may succeed, land late, or be lost at once. When the database goes back every process has a sign of
   it before it reads what is left. Nobody can tell some steps apart, so each of these is one: journal and answer, both under the release lock; entering a
   round and putting back, since nothing is released in between.

   More of the world, one thing at a time and without node 2: -DCOVER: node 0 may be away for ever (its disk is gone) or for a while, and the others go on; it
   requires copies, and node 1 holds them. -DRESTART: node 0 is killed and comes back. -DTWICE: a round without a loss comes first. -DNORESOLVER: no more.

   Rules that can be removed: -DMEMRELEASE -DNOJSIG -DNOGATE -DNOLOCK -DROUNDLATER -DNOSIGN -DSIGNEARLY -DNOOVERRULE -DABSEP -DTELLBARE -DANYNODE; with -DCOVER:
   -DNOCOPY -DNOFENCECOPY -DNOCLOSE; with -DRESTART: -DCLAIMFIRST -DBURYINROUND -DNEWCOMER (how the code stands); with -DTWICE: -DOLDFACT. */

#define NONE 9
#define ABANDONED 8
#if !defined(COVER) && !defined(RESTART) && !defined(TWICE) && !defined(NORESOLVER)
#define RESOLVER
#endif

/* the record. Of the versions of K and of each outcome only the highest counts */
byte req=0;                          /* the serial that owns K; 0 none */
bool intent[4]; byte out[4];         /* of serial s: its intent; its outcome, 1..3 the certificate with that signature */
byte newest=0; byte ended=0;         /* rows round(n) and round_end(n): RoundState */
byte lost=NONE;                      /* the newest round when commits were lost */
bool late[2]; byte lateOut[2];       /* commits of writer w under way: its intent; its outcome, for that serial */
#ifdef ABSEP
bool apart[4];
#endif

/* nodes, their journals, clients */
byte n[3];                           /* Rounds.n: the round that the node is in, its part in it done */
byte doneS[2], doneG[2], doneN[2];   /* journal.Done of a certificate: serial, signature, round */
byte doneA[3];                       /* journal.Done of an abandonment: serial */
byte rel[4]; byte relK=0; bool told[4]; /* what clients were given: certificate per serial, serial for K, "abandoned" */
#ifdef SIGNEARLY
bool forgot[3];
#endif
#ifdef COVER
#define BEGUN 1
#define DONE 2
#define COVERED 3
bool ready0=true; bool lock0=false;  /* Rounds.ready and Rounds.lock of node 0 */
byte recon0=0; bool closed0=false;   /* recon(round, node 0); the lane that node 0 opened in the round has ended */
byte held=0; byte heldG=0;           /* node 1's copy of node 0's record */
#endif
#ifdef RESTART
bool killed=false; bool unaware=false;
#endif

/* db.Store.Regress, seen and not dealt with yet (Rounds.signs). The code begins a round for each; here entering one that began after the loss will do */
#define PENDING(i) (lost!=NONE && n[i]<=lost)
#if defined(NOSIGN)
#define SIGN(i) false
#elif defined(SIGNEARLY)
#define SIGN(i) (PENDING(i) && !forgot[i])
#elif defined(RESTART)
#define SIGN(i) (PENDING(i) && !(i==0 && unaware))
#else
#define SIGN(i) PENDING(i)
#endif
/* Rounds.current: the node is in the round of the reading, has done its part, and there has been no sign since */
#ifdef COVER
#define CURRENT(i,r) (r==n[i] && !SIGN(i) && (i!=0 || ready0))
#else
#define CURRENT(i,r) (r==n[i] && !SIGN(i))
#endif
/* restorer.mayOverrule, Rounds.standing: unless others have gone on without this node */
#if defined(NOOVERRULE)
#define OVERRULES(missed,r) false
#elif defined(OLDFACT)
#define OVERRULES(missed,r) (!(missed) && r>=ended)        /* what is older than the newest round that ended gives way */
#else
#define OVERRULES(missed,r) (!(missed))
#endif

/* db.InsertIntents: INSERT IGNORE, so a taken request key or serial leaves everything as it was */
inline landIntent(s_) { if :: req==0 && !intent[s_] -> req=s_; intent[s_]=true :: else -> skip fi }
/* db.Lane.Append of an outcome: the foreign key demands the intent, the primary key admits one */
inline landOutcome(s_,v_) { if :: intent[s_] && out[s_]==0 -> out[s_]=v_ :: else -> skip fi }
/* restorer.outcomes, planOutcome: released beats unreleased, by a higher version of K or of the outcome. An intent that is there stays as it is */
inline putBack(s_,v_,r_,missed_) {
  if :: s_!=0 ->
    if :: !intent[s_] -> intent[s_]=true; if :: req==0 || OVERRULES(missed_,r_) -> req=s_ :: else -> skip fi  /* else beside, without the key */
       :: else -> skip fi;
#ifdef NOJSIG
    skip                                                    /* done without the bytes */
#else
    if :: out[s_]==0 || (out[s_]!=v_ && OVERRULES(missed_,r_)) -> out[s_]=v_ :: else -> skip fi
#endif
  :: else -> skip fi }
/* finish: the client has it */
inline release(s_,o_) {
  assert(rel[s_]==0 || rel[s_]==o_);                        /* I2: one certificate per serial */
  assert(relK==0 || relK==s_);                              /* I2: one serial per request */
  assert(!told[s_]);                                        /* nobody was told that it was abandoned */
  rel[s_]=o_; relK=s_ }
inline tell(s_) { assert(rel[s_]==0); told[s_]=true }
#define AGAIN s=0; o=0; r=NONE; goto INTEND
#ifdef RESTART
#define LATE(w) (w==0)
#else
#define LATE(w) true
#endif

/* Engine.runBatch on node i as writer w. Before its last step nothing in it knows of rounds */
proctype Node(byte i; byte w) { byte s=0; byte o=0; byte r=NONE;
{ skip;
INTEND:
  if                                                        /* intend, adopt: InsertIntents; then the row that owns K, whosever it is */
  :: atomic { true -> landIntent(w+1); s=req }
  :: atomic { LATE(w) && !late[w] -> late[w]=true }; goto INTEND  /* under way; also what db.Store.Write repeats when the database is back */
  fi;
  if                                                        /* sign, conclude: mine, or a duplicate */
  :: atomic { true -> landOutcome(s,w+1) }
  :: atomic { LATE(w) && lateOut[w]==0 -> lateOut[w]=s }
  fi;
  atomic { s=req; o=0; if :: s!=0 -> o=out[s] :: else -> skip fi; /* release: readBack, with the rounds in the same statement */
    r=newest;
#ifndef NOGATE
    if :: newest!=ended -> r=NONE :: else -> skip fi;       /* Rounds.current: RoundState.Open */
#endif
#ifndef ROUNDLATER
    if :: r==NONE -> AGAIN :: else -> skip fi;
#endif
    if :: s==0 || o==0 -> AGAIN :: else -> skip fi };       /* again: errVanished */
#ifdef ROUNDLATER
  atomic { r=newest; if :: newest!=ended -> AGAIN :: else -> skip fi };
#endif
#ifdef TELLBARE
  if :: atomic { o==ABANDONED -> tell(s); s=0; o=0; r=NONE }; goto ASKED  /* before Rounds.done */
     :: else -> skip fi;
#endif
  atomic { if :: !CURRENT(i,r) -> AGAIN :: else -> skip fi; /* Rounds.done: takes the release lock; current */
#ifdef MEMRELEASE
    if :: o!=ABANDONED -> o=w+1 :: else -> skip fi;         /* what was signed instead of what the row says */
#endif
#ifdef NOLOCK
  };
  atomic {                                                  /* by now the node may be in another round */
#endif
    if :: o==ABANDONED -> doneA[i]=s; tell(s); s=0; o=0; r=NONE; goto ASKED  /* judge: 409 request-abandoned */
       :: else -> skip fi;
    doneS[i]=s; doneG[i]=o;                                 /* Rounds.write: journal.Done, fsynced; the copier gets it at the same time */
#ifdef TWICE
    doneN[i]=r;
#endif
#ifdef COVER
    r=NONE; if :: i==0 -> lock0=true :: else -> release(s,o); s=0; o=0; goto ASKED fi };  /* nobody asks who holds node 1's copies */
  if
#ifdef NOCOPY
  :: atomic { true -> lock0=false; release(s,o); s=0; o=0 }  /* Rounds.alone lets it pass */
#else
  :: atomic { held==s && heldG==o -> lock0=false; release(s,o); s=0; o=0 }  /* Rounds.copied: Copies.Wait */
#endif
  :: atomic { true -> lock0=false; AGAIN }                  /* ErrOldRound, or no answer in time and alone refuses; the record stays in the journal */
  fi;
#else
    release(s,o); s=0; o=0; r=NONE };
#endif
ASKED:
#ifdef RESTART
  skip                                                      /* the next writer is asked again */
} unless { w==0 && killed } }
#else
  if :: goto INTEND :: skip fi                              /* the client asks again under the same key */
} }
#endif

#ifdef RESOLVER
/* Engine.abandon on node 2 */
proctype Resolver() { byte s=0; byte r=NONE; bool only=false;
  if :: atomic { intent[1] && out[1]==0 -> s=1 } :: atomic { intent[2] && out[2]==0 -> s=2 } fi;  /* adopt or sweepSome, takeOver: recheck refuses */
  if
#ifdef ABSEP
  :: atomic { true -> apart[s]=true; only=true }            /* under a key of its own */
#else
  :: atomic { true -> landOutcome(s,ABANDONED) }            /* lane.Append */
#endif
#ifdef ANYNODE
  :: only=true                                              /* committed; only the database node that did has it, and is read from */
#endif
  fi;
  atomic { r=newest;                                        /* CertificateElsewhere: with the rounds in the same statement */
    if :: newest!=ended || (out[s]!=ABANDONED && !only) -> s=0; r=NONE; only=false; goto FINISH :: else -> skip fi };
  atomic { if :: CURRENT(2,r) -> doneA[2]=s; tell(s) :: else -> skip fi; s=0; r=NONE; only=false };  /* Rounds.done; 409 */
FINISH: skip }
#endif

#ifdef COVER
#define PART0 (recon0>=DONE)
#else
#define PART0 (n[0]==newest)
#endif
/* Rounds.Run on node i */
proctype Rounds(byte i) {
endR: do
  :: atomic { SIGN(i) && (newest==lost || newest==lost+1) -> newest=lost+1;  /* look, witness: BeginRound; a duplicate is another's */
#ifdef SIGNEARLY
     forgot[i]=true                                         /* Rounds.signs is raised before enter */
#endif
     }
#ifdef TWICE
  :: atomic { newest==0 && lost==NONE -> newest=1 }         /* a sign without a loss */
#endif
  :: atomic { newest>n[i] -> n[i]=newest;                   /* look, enter; reconcile: changeLanes, restore, "done" */
     if :: i<2 -> putBack(doneS[i],doneG[i],doneN[i],false) :: else -> skip fi;
#ifdef RESOLVER
     putBack(doneA[i],ABANDONED,0,false);
#endif
#ifdef COVER
     if :: i==1 -> putBack(held,heldG,0,false) :: else -> skip fi  /* lost: Held.Each */
#endif
     }
  :: atomic { n[i]==newest && newest!=ended && PART0 && n[1]==newest && n[2]==newest ->  /* finish: EndRound; each node's part is done or covered */
     if :: (lost==NONE || newest>lost) ->                                   /* what was released is back */
       assert(relK==0 || req==relK);
       assert((rel[1]==0 || out[1]==rel[1]) && (rel[2]==0 || out[2]==rel[2]) && (rel[3]==0 || out[3]==rel[3]));
       assert((!told[1] || out[1]==ABANDONED) && (!told[2] || out[2]==ABANDONED))
     :: else -> skip fi;
     ended=newest }
  od }

#ifdef COVER
/* Rounds.Run on node 0, step by step */
proctype Rounds0() { byte at=0;                             /* how far reconcile is */
endR: do
  :: atomic { SIGN(0) && newest==lost -> newest=lost+1 }
  :: atomic { newest>n[0] && !lock0 -> n[0]=newest; ready0=false }          /* enter: waits for releases under way */
  :: atomic { at==0 && !ready0 && recon0<DONE -> recon0=BEGUN; at=1 }       /* reconcile: "begun"; changeLanes: the lane of the round */
  :: atomic { at==1 && !closed0 -> putBack(doneS[0],doneG[0],0,false); at=2 }  /* restore: intent and outcome travel in that lane */
  :: atomic { at==1 && closed0 -> at=0 }                                    /* ErrLaneClosed: looks again */
  :: atomic { at==2 && recon0==BEGUN -> recon0=DONE; ready0=true; at=3 }    /* "done", unless "covered" came first */
  :: atomic { (at==0 || at==2) && !ready0 && recon0==COVERED -> putBack(doneS[0],doneG[0],0,true); ready0=true; at=3 }  /* reconcile: late */
  od }

/* finish, spokenFor, cover on node 1 or 2. That they wait 10 s first means nothing here */
proctype Cover() { byte saw=NONE;
endC: do
  :: atomic { saw==NONE && newest!=ended && recon0<DONE && n[1]==newest && n[2]==newest -> saw=recon0 };  /* whoever may be its holder has done its part */
     atomic { true;
#ifndef NOCLOSE
       if :: saw==BEGUN -> closed0=true :: else -> skip fi; /* coverNode: CloseLane */
#endif
       skip };
     atomic { if :: recon0==saw -> recon0=COVERED :: else -> skip fi; saw=NONE }  /* AppendRecon: "covered" or the node's own row, not both */
  od }

/* holder.Copier.catchUp, Holder.Put: at once, later or never. What an owner in an older round sends is refused */
#ifdef NOFENCECOPY
#define FENCE true
#else
#define FENCE (n[1]<=n[0])
#endif
proctype Copier() {
endP: do :: atomic { (held!=doneS[0] || heldG!=doneG[0]) && FENCE -> held=doneS[0]; heldG=doneG[0] } od }
#endif

#ifdef RESTART
#ifdef BURYINROUND
#define MAYBURY true
#else
#define MAYBURY (newest==ended)
#endif
/* node 0 is killed and started again. Rounds.start finds the loss: behind, by its own records, those that it holds, or what responders have */
proctype Restart() {
  killed=true;
#ifdef CLAIMFIRST
  unaware=(lost!=NONE && doneS[0]!=0);                      /* its older lanes are ended first, where the database sees their end: nothing is amiss */
#endif
#ifdef NEWCOMER
  unaware=(lost!=NONE && doneS[0]==0);                      /* it has nothing of what is lost */
#endif
  atomic { n[0]==newest && !SIGN(0) && MAYBURY ->           /* Engine.recover, after Rounds.Entered */
    if :: !intent[1] && doneS[0]!=1 -> intent[1]=true; out[1]=ABANDONED  /* settle: find, in Rounds.Complete; bury: without K */
       :: else -> skip fi };
  run Node(0,2) }
#endif

/* commits that were under way */
proctype Net() {
endN: do
  :: atomic { late[0] -> late[0]=false; landIntent(1) }
  :: atomic { late[1] -> late[1]=false; landIntent(2) }
  :: atomic { lateOut[0]!=0 -> landOutcome(lateOut[0],1); lateOut[0]=0 }
  :: atomic { lateOut[1]!=0 -> landOutcome(lateOut[1],2); lateOut[1]=0 }
  od }

/* the database goes back: to before the outcomes, or the intents too */
proctype Fault() {
  atomic { true -> lost=newest; out[1]=0; out[2]=0; out[3]=0;
    if :: req=0; intent[1]=false; intent[2]=false; intent[3]=false :: skip fi } }

init { atomic {
  run Node(0,0); run Node(1,1); run Rounds(1); run Rounds(2); run Net(); run Fault();
#ifdef RESOLVER
  run Resolver();
#endif
#ifdef RESTART
  run Restart();
#endif
#ifdef COVER
  run Rounds0(); run Cover(); run Copier()
#else
  run Rounds(0)
#endif
  } }
